//! `nfqd serve`: metrics, the status as JSON, and a live page, by HTTP. A process of its own without
//! privileges, which asks the daemon on the observation socket.
//!
//! The server answers only GET requests for a fixed set of paths, with one thread per connection and at
//! most 32 connections. It asks the daemon for the status, and for the last decisions, at most once a second each,
//! regardless of the number of clients.

pub mod metrics;
pub mod page;
mod rates;

use crate::api::client::{ask, status};
use crate::api::{Answer, ObservedDecision, Request, Status};
use metrics::Scope;
use page::Content;
use rates::Rates;
use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The address that is listened on by default.
pub const DEFAULT_LISTEN: SocketAddr =
    SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 9477);

/// The most connections at a time.
const MAX_CONNECTIONS: usize = 32;
/// The most connections to which events are sent: pages that stay open leave room for a scrape.
const MAX_STREAMS: usize = MAX_CONNECTIONS / 2;
/// The longest head of a request, in bytes.
const MAX_HEAD: usize = 8192;
/// The most header lines of a request.
const MAX_HEADERS: usize = 64;
/// The time that a client has for its request, and for each part of the answer.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(5);
/// The age of the status that is shown.
const STATUS_AGE: Duration = Duration::from_secs(1);
/// The time after which a stream of events ends; a browser connects again.
const STREAM_TIME: Duration = Duration::from_secs(300);

/// The status, as it was last asked for.
struct Source {
    socket: PathBuf,
    last: Mutex<Option<Sample>>,
    decisions: Mutex<Option<(Instant, Arc<Vec<ObservedDecision>>)>>,
    rates: Mutex<Rates>,
    /// The connections to which events are sent.
    streams: Arc<AtomicUsize>,
}

/// A sample: its time, and the status; `None` if the daemon did not answer.
#[derive(Clone)]
struct Sample {
    time: Instant,
    status: Option<Arc<Status>>,
}

impl Source {
    /// Returns the status; `None` if the daemon does not answer.
    fn status(&self) -> Option<Arc<Status>> {
        self.sample().status
    }

    /// Returns a sample of the status that is at most a second old.
    fn sample(&self) -> Sample {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sample) = &*last
            && sample.time.elapsed() < STATUS_AGE
        {
            return sample.clone();
        }
        let status = status(&self.socket).ok().map(Arc::new);
        let sample = Sample { time: Instant::now(), status };
        *last = Some(sample.clone());
        sample
    }

    /// Returns the last decisions of the engine, as of at most a second ago. They are recorded while
    /// somebody asks for them, and for a minute after.
    fn decisions(&self) -> Arc<Vec<ObservedDecision>> {
        let mut last = self.decisions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((time, decisions)) = &*last
            && time.elapsed() < STATUS_AGE
        {
            return Arc::clone(decisions);
        }
        let request = Request::Observe { since: None, most: page::DECISIONS };
        let decisions = match ask(&self.socket, &request) {
            Ok(Answer::Observed(observed)) => observed.decisions,
            // The headline says that the daemon does not answer.
            _ => Vec::new(),
        };
        let decisions = Arc::new(decisions);
        *last = Some((Instant::now(), Arc::clone(&decisions)));
        decisions
    }

    /// Renders a sample of the status, with the rates up to it, and the last decisions.
    fn render<T>(&self, render: fn(Content<'_>, &mut Rates) -> T) -> T {
        let (sample, decisions) = (self.sample(), self.decisions());
        let mut rates = self.rates.lock().unwrap_or_else(PoisonError::into_inner);
        rates.set_sample(sample.time);
        let content = Content { status: sample.status.as_deref(), decisions: &decisions };
        render(content, &mut rates)
    }
}

/// Serves until the process ends.
///
/// # Errors
/// If the address cannot be listened on.
pub fn serve(listen: SocketAddr, socket: &Path) -> io::Result<()> {
    let listener = TcpListener::bind(listen)?;
    let local = listener.local_addr()?;
    log::info!("serving on http://{local}/");
    run(&listener, local, socket)
}

/// Serves on a listener until the process ends.
pub fn run(listener: &TcpListener, local: SocketAddr, socket: &Path) -> ! {
    let source = Arc::new(Source {
        socket: socket.to_path_buf(),
        last: Mutex::new(None),
        decisions: Mutex::new(None),
        rates: Mutex::new(Rates::new(Instant::now())),
        streams: Arc::new(AtomicUsize::new(0)),
    });
    let connections = Arc::new(AtomicUsize::new(0));
    loop {
        let (stream, _) = match listener.accept() {
            Ok(accepted) => accepted,
            Err(error) => {
                // The client has gone, or there are too many descriptors for a moment.
                log::warn!("a connection cannot be accepted: {error}");
                std::thread::sleep(ACCEPT_PAUSE);
                continue;
            }
        };
        let Some(place) = Place::take(&connections, MAX_CONNECTIONS) else {
            // The connection is closed without an answer.
            continue;
        };
        let source = Arc::clone(&source);
        let spawned = std::thread::Builder::new().name("client".to_string()).spawn(move || {
            let _place = place;
            // A client that has gone is no failure.
            let _ = answer(stream, local, &source);
        });
        if let Err(error) = spawned {
            log::warn!("no thread for a client: {error}");
        }
    }
}

/// The pause after a connection could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// One of the connections that there may be at a time.
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(taken: &Arc<AtomicUsize>, most: usize) -> Option<Place> {
        let place = Place(Arc::clone(taken));
        let before = taken.fetch_add(1, Ordering::Relaxed);
        (before < most).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A request, as far as it matters.
struct HttpRequest {
    path: String,
    query: String,
}

/// The reason a request is refused: the status line of the answer.
type Refusal = &'static str;

fn answer(mut stream: TcpStream, local: SocketAddr, source: &Source) -> io::Result<()> {
    stream.set_read_timeout(Some(CLIENT_TIMEOUT))?;
    stream.set_write_timeout(Some(CLIENT_TIMEOUT))?;
    match read_request(&mut stream, local)? {
        Ok(request) if request.path == "/events" => stream_events(&mut stream, source),
        Ok(request) => respond(&mut stream, &request, source),
        Err(refusal) => write_answer(&mut stream, refusal, "text/plain; charset=utf-8", refusal),
    }
}

/// Reads the head of a request. Its body, if it has one, is not read: the connection ends.
fn read_request(
    stream: &mut TcpStream,
    local: SocketAddr,
) -> io::Result<Result<HttpRequest, Refusal>> {
    let start = Instant::now();
    let mut head = Vec::new();
    let mut buffer = [0; 1024];
    while !head.windows(4).any(|four| four == b"\r\n\r\n") {
        if head.len() > MAX_HEAD || start.elapsed() > CLIENT_TIMEOUT {
            return Ok(Err("431 Request Header Fields Too Large"));
        }
        match stream.read(&mut buffer)? {
            0 => return Ok(Err("400 Bad Request")),
            count => head.extend_from_slice(buffer.get(..count).unwrap_or_default()),
        }
    }
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut parsed = httparse::Request::new(&mut headers);
    if !parsed.parse(&head).is_ok_and(|status| status.is_complete()) {
        return Ok(Err("400 Bad Request"));
    }
    if parsed.method != Some("GET") {
        return Ok(Err("405 Method Not Allowed"));
    }
    let host = parsed.headers.iter().find(|header| header.name.eq_ignore_ascii_case("host"));
    let host = host.and_then(|header| std::str::from_utf8(header.value).ok()).unwrap_or_default();
    if !is_own_name(host, local) {
        return Ok(Err("421 Misdirected Request"));
    }
    let target = parsed.path.unwrap_or("/");
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    Ok(Ok(HttpRequest { path: path.to_string(), query: query.to_string() }))
}

/// Whether a request's Host is allowed: on a loopback address it must be one, because a foreign site
/// may resolve its own name to it (DNS rebinding).
fn is_own_name(host: &str, local: SocketAddr) -> bool {
    if !local.ip().is_loopback() {
        return true;
    }
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let name = name.trim_start_matches('[').trim_end_matches(']');
    name == "localhost" || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

fn respond(stream: &mut TcpStream, request: &HttpRequest, source: &Source) -> io::Result<()> {
    const HTML: &str = "text/html; charset=utf-8";
    const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";
    match request.path.as_str() {
        "/" => write_answer(stream, "200 OK", HTML, &source.render(page::html)),
        "/page.js" => {
            write_answer(stream, "200 OK", "text/javascript; charset=utf-8", page::SCRIPT)
        }
        "/page.css" => write_answer(stream, "200 OK", "text/css; charset=utf-8", page::STYLE),
        "/metrics" => match scopes(&request.query) {
            Ok((scopes, middlebox)) => {
                let text = metrics::text(source.status().as_deref(), &scopes, middlebox.as_deref());
                write_answer(stream, "200 OK", TEXT, &text)
            }
            Err(error) => write_answer(stream, "400 Bad Request", TEXT, &error),
        },
        "/api/status" => match source.status() {
            Some(status) => {
                let text = status.to_json();
                write_answer(stream, "200 OK", "application/json", &text)
            }
            None => {
                let text = "{\"problems\":[\"NOT RUNNING: the daemon does not answer\"]}\n";
                write_answer(stream, "503 Service Unavailable", "application/json", text)
            }
        },
        _ => write_answer(stream, "404 Not Found", TEXT, "/, /metrics, /api/status\n"),
    }
}

/// Parses the query of `/metrics`: the scopes, and the middlebox.
fn scopes(query: &str) -> Result<(BTreeSet<Scope>, Option<String>), String> {
    let (mut scopes, mut middlebox) = (BTreeSet::new(), None);
    for part in query.split('&').filter(|part| !part.is_empty()) {
        match part.split_once('=') {
            Some(("scope", names)) => {
                for name in names.replace("%2C", ",").split(',') {
                    let scope = Scope::ALL.into_iter().find(|scope| scope.name() == name);
                    let names = Scope::ALL.map(Scope::name).join(", ");
                    scopes.insert(scope.ok_or_else(|| format!("scope is one of {names}\n"))?);
                }
            }
            Some(("middlebox", mac)) => {
                let mac = mac.replace("%3A", ":").replace("%3a", ":");
                let mac = mac.parse::<nfqd_shmctl::MacAddr>();
                let wrong = |_| "middlebox is a MAC like 12:13:14:15:16:17\n".to_string();
                middlebox = Some(mac.map_err(wrong)?.to_string());
            }
            _ => return Err("the query takes scope= and middlebox=\n".to_string()),
        }
    }
    if scopes.is_empty() {
        scopes.extend(Scope::DEFAULT);
    }
    Ok((scopes, middlebox))
}

fn write_answer(stream: &mut TcpStream, status: &str, kind: &str, body: &str) -> io::Result<()> {
    let head = head(status, kind, &format!("Content-Length: {}\r\n", body.len()));
    stream.write_all(head.as_bytes())?;
    stream.write_all(body.as_bytes())
}

fn head(status: &str, kind: &str, length: &str) -> String {
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{length}Connection: close\r\nCache-Control: no-store\r\n\
         Content-Security-Policy: default-src 'self'; frame-ancestors 'none'\r\nX-Content-Type-Options: nosniff\r\n\
         Referrer-Policy: no-referrer\r\n\r\n"
    )
}

/// Sends the cells of the page once a second (server-sent events).
fn stream_events(stream: &mut TcpStream, source: &Source) -> io::Result<()> {
    let Some(_place) = Place::take(&source.streams, MAX_STREAMS) else {
        return write_answer(
            stream,
            "503 Service Unavailable",
            "text/plain",
            "too many pages are open\n",
        );
    };
    stream.write_all(head("200 OK", "text/event-stream", "").as_bytes())?;
    let end = Instant::now() + STREAM_TIME;
    while Instant::now() < end {
        let data = serde_json::to_string(&source.render(page::cells)).map_err(io::Error::other)?;
        stream.write_all(format!("data: {data}\n\n").as_bytes())?;
        std::thread::sleep(STATUS_AGE);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Serves on a port of its own, without a daemon; the thread ends with the test.
    fn server() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let local = listener.local_addr().unwrap();
        std::thread::spawn(move || -> () { run(&listener, local, Path::new("/nowhere")) });
        local
    }

    fn send(to: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(to).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut out = String::new();
        stream.read_to_string(&mut out).unwrap();
        out
    }

    #[test]
    fn paths_are_answered_and_others_refused() {
        let server = server();
        let get =
            |path: &str| send(server, &format!("GET {path} HTTP/1.1\r\nHost: localhost:9\r\n\r\n"));
        for (path, status, words) in [
            ("/", "200", "NOT RUNNING"),
            ("/page.js", "200", "EventSource"),
            ("/page.css", "200", "headline"),
            ("/metrics", "200", "nfqd_up 0"),
            ("/metrics?scope=rules,global", "200", "nfqd_up 0"),
            ("/metrics?scope=all", "400", "scope is one of global"),
            ("/metrics?middlebox=x", "400", "middlebox is a MAC"),
            ("/api/status", "503", "NOT RUNNING"),
            ("/etc/passwd", "404", "/metrics"),
            ("/../../etc/passwd", "404", "/metrics"),
        ] {
            let answer = get(path);
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{path}: {answer}");
            assert!(answer.contains(words), "{path}: {answer}");
            assert!(answer.contains("Content-Security-Policy: default-src 'self'"), "{answer}");
        }
    }

    #[test]
    fn other_requests_are_refused() {
        let server = server();
        let long =
            format!("GET / HTTP/1.1\r\nHost: localhost\r\nA: {}\r\n\r\n", "a".repeat(20_000));
        for (request, status) in [
            ("POST / HTTP/1.1\r\nHost: localhost\r\n\r\n", "405"),
            ("GET / HTTP/1.1\r\nHost: attacker.example\r\n\r\n", "421"),
            ("GET / HTTP/1.1\r\n\r\n", "421"),
            ("nonsense\r\n\r\n", "400"),
        ] {
            let answer = send(server, request);
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{request}: {answer}");
        }
        let mut stream = TcpStream::connect(server).unwrap();
        // The client may end the connection before all is sent.
        let _ = stream.write_all(long.as_bytes());
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 431"));
    }

    #[test]
    fn pages_that_stay_open_leave_room_for_a_scrape() {
        let server = server();
        let open = |_| {
            let mut stream = TcpStream::connect(server).unwrap();
            stream.write_all(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
            let mut start = [0; 12];
            stream.read_exact(&mut start).unwrap();
            (stream, start)
        };
        let pages: Vec<_> = (0..MAX_STREAMS + 2).map(open).collect();
        let served = pages.iter().filter(|(_, start)| start == b"HTTP/1.1 200").count();
        assert_eq!((served, pages[MAX_STREAMS].1), (MAX_STREAMS, *b"HTTP/1.1 503"));
        let metrics = send(server, "GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n");
        assert!(metrics.starts_with("HTTP/1.1 200 "), "{metrics}");
    }

    #[test]
    fn events_carry_the_cells() {
        let server = server();
        let mut stream = TcpStream::connect(server).unwrap();
        stream.write_all(b"GET /events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n").unwrap();
        let mut text = String::new();
        let mut buffer = [0; 512];
        while !text.contains("\n\n") || !text.contains("data: ") {
            let count = stream.read(&mut buffer).unwrap();
            assert!(count > 0, "{text}");
            text.push_str(std::str::from_utf8(&buffer[..count]).unwrap());
        }
        assert!(text.contains("text/event-stream"), "{text}");
        assert!(text.contains("[[\"headline\",\"NOT RUNNING"), "{text}");
    }
}
