//! The page of `nfqd serve` in a browser: headless Chromium, driven by WebDriver (W3C).
#![allow(clippy::unwrap_used)]

use nfqd_tests::daemon::{Daemon, NFQD, Process, program};
use nfqd_tests::netns::{in_netns, run};
use nfqd_tests::topology::wait_for;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::Duration;

const DRIVER: &str = "127.0.0.1:9515";
const PAGE: &str = "http://127.0.0.1:9477/";

/// A browser session.
struct Browser {
    session: String,
    _driver: Process,
}

/// Sends a command to the driver; returns its value.
fn command(method: &str, path: &str, body: &Value) -> Value {
    let body = if method == "GET" { String::new() } else { body.to_string() };
    let mut stream = TcpStream::connect(DRIVER).unwrap();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: {DRIVER}\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
    // The driver leaves the connection open.
    let mut reader = BufReader::new(stream);
    let (mut status, mut length) = (String::new(), 0);
    reader.read_line(&mut status).unwrap();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        match line.to_ascii_lowercase().split_once(':') {
            Some(("content-length", value)) => length = value.trim().parse().unwrap(),
            Some(_) => {}
            None => break,
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    let answer: Value = serde_json::from_slice(&body).unwrap();
    assert!(status.contains(" 200 "), "{path}: {answer}");
    answer["value"].clone()
}

impl Browser {
    fn start(profile: &std::path::Path) -> Browser {
        let driver = Command::new("chromedriver").arg("--port=9515").spawn().expect("chromedriver");
        let driver = Process(driver);
        wait_for("the driver", || TcpStream::connect(DRIVER).is_ok());
        let profile = format!("--user-data-dir={}", profile.display());
        let arguments = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            &profile,
        ];
        let options = json!({ "capabilities": { "alwaysMatch": {
            "goog:chromeOptions": { "args": arguments },
        }}});
        let session = command("POST", "/session", &options);
        let session = format!("/session/{}", session["sessionId"].as_str().unwrap());
        Browser { session, _driver: driver }
    }

    fn open(&self, url: &str) {
        command("POST", &format!("{}/url", self.session), &json!({ "url": url }));
    }

    /// Returns the value of an expression of the page.
    fn value(&self, expression: &str) -> Value {
        let script = json!({ "script": format!("return {expression};"), "args": [] });
        command("POST", &format!("{}/execute/sync", self.session), &script)
    }

    fn text(&self) -> String {
        self.value("document.body.innerText").as_str().unwrap().to_string()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            command("DELETE", &self.session, &json!({}));
        }
    }
}

#[test]
#[ignore = "needs root and Chromium: tests/run.sh browser"]
fn the_page_shows_the_daemon_and_follows_it() {
    in_netns(|| {
        // The name of a bridge may have any characters but a slash and spaces.
        const HOSTILE: &str = "<img&src=x>";
        run(&format!("ip link add {HOSTILE} type bridge"));
        run(&format!("ip link set {HOSTILE} up"));
        let folder = tempfile::tempdir().unwrap();
        let commands = folder.path().join("commands");
        let line = |n: u32| {
            let [.., a, b] = n.to_be_bytes();
            format!("R F 2:1:0:0:{a:x}:{b:x} 10.9.{a}.{b}\n")
        };
        let hostile = format!("[{HOSTILE}] R F 2:0:0:0:0:a 10.0.0.10\n");
        std::fs::write(&commands, (0..1000).map(line).collect::<String>() + &hostile).unwrap();
        let mut daemon = Daemon::start(&["--commands", commands.to_str().unwrap()]);
        daemon.must("R F 2:0:0:0:0:7 10.0.0.7");
        daemon.must("R L 2:0:0:0:0:7 10.0.0.7:80 rr 10.0.0.8@2:0:0:0:0:8");
        let mut serve = Command::new(program(NFQD));
        let serve = serve.args(["serve", "--socket"]).arg(daemon.control()).spawn().unwrap();
        let _serve = Process(serve);
        wait_for("the page", || TcpStream::connect("127.0.0.1:9477").is_ok());
        let profile = tempfile::tempdir().unwrap();
        let browser = Browser::start(profile.path());
        browser.open(PAGE);
        let text = browser.text();
        assert!(text.contains("02:00:00:00:00:07") && text.contains("10.0.0.7:80"), "{text}");
        let rows = browser.value("document.querySelectorAll('tr').length").as_u64().unwrap();
        assert!(rows > 1000, "{rows}");
        assert!(text.contains("Last decisions of the engine"), "{text}");

        // A mark of this very document: it changes in place, without being loaded again.
        browser.value("document.documentElement.dataset.mark = 'kept'");
        let rules = "[...document.querySelectorAll('tr')].find((row) => row.textContent.includes('02:00:00:00:00:07') && row.cells.length === 7).cells[5].textContent";
        let before = browser.value(rules);
        daemon.must("A 2:0:0:0:0:7 #1 T 2 d 22");
        wait_for("the rule", || browser.value(rules) != before);
        assert_eq!(browser.value("document.documentElement.dataset.mark"), "kept");
        // A new row has the page made anew.
        daemon.must("R F 2:0:0:0:0:9 10.0.0.9");
        wait_for("the new middlebox", || browser.text().contains("02:00:00:00:00:09"));
        assert!(browser.value("document.documentElement.dataset.mark").is_null());

        // Text from elsewhere stays text.
        assert!(browser.text().contains(HOSTILE));
        assert_eq!(browser.value("document.querySelectorAll('img').length"), 0);
        let foreign = browser
            .value("document.querySelectorAll('script:not([src]), [onclick], [style]').length");
        assert_eq!(foreign, 0);

        daemon.kill();
        wait_for("that it is gone", || browser.text().contains("NOT RUNNING"));
        daemon.restart();
        wait_for("that it is back", || !browser.text().contains("NOT RUNNING"));
    });
}
