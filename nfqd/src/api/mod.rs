//! The control protocol: requests of programs on this host, and the daemon's answers.
//!
//! A client connects to a Unix socket and sends one JSON object a line; the daemon answers each
//! with one JSON object a line:
//!
//! ```text
//! > {"v":1,"ask":"status"}
//! < {"v":1,"nfqd":"0.1.0","status":{…}}
//! > {"v":1,"ask":"tea"}
//! < {"v":1,"nfqd":"0.1.0","error":{"code":"unsupported","message":"…"}}
//! ```
//!
//! `v` is the version of the protocol. Fields may be added to an answer within a version; a client
//! ignores those that it does not know. The socket `control` takes every request, `observe` only
//! those that change nothing.

pub mod client;
pub mod legacy;
mod observed;
mod problems;
mod status;
mod trace;

pub use observed::{Observed, ObservedDecision};
pub use problems::first_line;
pub use status::{
    BackendState, BackendStatus, ChannelStatus, FlowTableStatus, MiddleboxStatus, QueueStatus,
    RuleStatus, ServiceStatus, Status,
};
pub use trace::{RuleTrace, TargetTrace, Trace, TraceRequest};

use serde::{Deserialize, Serialize};

/// The version of the protocol.
pub const VERSION: u32 = 1;

/// The longest request in bytes, its line end included.
pub const MAX_REQUEST: usize = 4096;

/// A request.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "kebab-case")]
pub enum Request {
    /// The state of the daemon.
    Status,
    /// The treatment that a packet would get now, and the reason.
    Trace(TraceRequest),
    /// The engine's decisions, as they happen.
    Observe {
        /// The number of the first decision; that of the newest ones if there is none.
        since: Option<u64>,
        /// The most decisions to return.
        most: usize,
    },
    /// Read the configuration again, as at SIGHUP.
    Reload,
    /// Add a channel to the running daemon.
    Attach {
        /// The channel: `NAME[,KEY=VALUE]…`, with the keys of `--shm`.
        channel: String,
    },
    /// Remove a channel that was attached.
    Detach {
        /// The name, or the path of the region. With keys behind it, only a channel with these keys is
        /// removed.
        name: String,
    },
}

impl Request {
    /// The names of all requests, for messages.
    pub const NAMES: [&str; 6] = ["status", "trace", "observe", "reload", "attach", "detach"];

    /// Whether the request changes something.
    pub fn is_change(&self) -> bool {
        match self {
            Request::Status | Request::Trace(_) | Request::Observe { .. } => false,
            Request::Reload | Request::Attach { .. } | Request::Detach { .. } => true,
        }
    }

    /// Returns the request as a line of the protocol.
    pub fn to_line(&self) -> String {
        to_line(&Envelope { v: VERSION, nfqd: None, body: self })
    }

    /// Parses a line of the protocol.
    ///
    /// # Errors
    /// An error for the answer.
    pub fn parse(line: &[u8]) -> Result<Request, RequestError> {
        let invalid =
            |error: serde_json::Error| RequestError::new(ErrorCode::Syntax, error.to_string());
        let value: serde_json::Value = serde_json::from_slice(line).map_err(invalid)?;
        match value.get("v").and_then(serde_json::Value::as_u64) {
            Some(version) if version == u64::from(VERSION) => {}
            Some(version) => {
                let message = format!("version {version}; this nfqd speaks version {VERSION}");
                return Err(RequestError::new(ErrorCode::Version, message));
            }
            None => {
                let message = format!("no version; write \"v\":{VERSION}");
                return Err(RequestError::new(ErrorCode::Version, message));
            }
        }
        let name = value.get("ask").and_then(serde_json::Value::as_str).unwrap_or_default();
        if !Request::NAMES.contains(&name) {
            let name: String = name.chars().take(48).collect();
            let message = format!("'{name}'; \"ask\" is one of {}", Request::NAMES.join(", "));
            return Err(RequestError::new(ErrorCode::Unsupported, message));
        }
        serde_json::from_value(value).map_err(invalid)
    }
}

/// An answer.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// The state of the daemon.
    Status(Box<Status>),
    /// The treatment of a packet, and the reason.
    Trace(Box<Trace>),
    /// Decisions of the engine.
    Observed(Box<Observed>),
    /// The configuration has been read again.
    Reloaded {},
    /// The channel is attached.
    Attached {},
    /// The channel is detached.
    Detached {},
    /// The request was not carried out.
    Error(RequestError),
}

impl Answer {
    /// Returns the answer as a line of the protocol.
    pub fn to_line(&self) -> String {
        to_line(&Envelope {
            v: VERSION,
            nfqd: Some(env!("CARGO_PKG_VERSION").to_string()),
            body: self,
        })
    }

    /// Parses a line of the protocol.
    ///
    /// # Errors
    /// If it is not an answer.
    pub fn parse(line: &str) -> serde_json::Result<Answer> {
        serde_json::from_str::<Envelope<Answer>>(line).map(|envelope| envelope.body)
    }
}

/// The answer to [`Request::Status`] as a line of the protocol, to which middleboxes are added one
/// after the other.
pub struct StatusLine(Vec<u8>);

impl StatusLine {
    /// The end of the line, behind the middleboxes: they are the last field.
    const END: &'static [u8] = b"]}}\n";

    /// Begins with a status, whose middleboxes are left out. `size` is the expected length in bytes.
    pub fn new(status: Status, size: usize) -> StatusLine {
        let status = Status { middleboxes: Vec::new(), ..status };
        let mut line = Answer::Status(Box::new(status)).to_line().into_bytes();
        debug_assert!(line.ends_with(b"\"middleboxes\":[]}}\n"));
        line.truncate(line.len().saturating_sub(StatusLine::END.len()));
        line.reserve(size);
        StatusLine(line)
    }

    /// Adds a middlebox.
    pub fn push(&mut self, middlebox: &MiddleboxStatus) {
        if !self.0.ends_with(b"[") {
            self.0.push(b',');
        }
        // The type has string keys only, so it serializes; a vector takes everything that is written.
        let _ = serde_json::to_writer(&mut self.0, middlebox);
    }

    /// Returns the whole line.
    pub fn finish(mut self) -> Vec<u8> {
        self.0.extend_from_slice(StatusLine::END);
        self.0
    }
}

/// The reason a request was not carried out.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct RequestError {
    /// The code.
    pub code: ErrorCode,
    /// The message: what is wrong, and what to do.
    pub message: String,
}

impl RequestError {
    /// An error.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> RequestError {
        RequestError { code, message: message.into() }
    }
}

/// The code of a [`RequestError`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorCode {
    /// The line is not a request.
    Syntax,
    /// The version of the protocol is missing or unknown.
    Version,
    /// There is no such request.
    Unsupported,
    /// The request is not allowed on this socket.
    Denied,
    /// There are too many clients.
    Busy,
    /// The request was valid but failed.
    Failed,
}

#[derive(Serialize, Deserialize)]
struct Envelope<T> {
    v: u32,
    /// The version of the daemon that answers.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    nfqd: Option<String>,
    #[serde(flatten)]
    body: T,
}

fn to_line<T: Serialize>(envelope: &Envelope<T>) -> String {
    // The types of this module have string keys only, so they serialize.
    let mut line = serde_json::to_string(envelope).unwrap_or_default();
    line.push('\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_answers_have_the_documented_form() {
        assert_eq!(Request::Status.to_line(), "{\"v\":1,\"ask\":\"status\"}\n");
        assert_eq!(Request::parse(b"{\"ask\":\"reload\",\"v\":1}"), Ok(Request::Reload));
        let error = Answer::Error(RequestError::new(ErrorCode::Denied, "no"));
        let line = error.to_line();
        let version = env!("CARGO_PKG_VERSION");
        let expected = format!(
            "{{\"v\":1,\"nfqd\":\"{version}\",\"error\":{{\"code\":\"denied\",\"message\":\"no\"}}}}\n"
        );
        assert_eq!((line.as_str(), Answer::parse(&line).unwrap()), (expected.as_str(), error));
        let status = Answer::Status(Box::new(Status { pid: 7, ..Status::default() }));
        assert_eq!(Answer::parse(&status.to_line()).unwrap(), status);
        assert!(Answer::Reloaded {}.to_line().ends_with("\"reloaded\":{}}\n"));
    }

    #[test]
    fn a_bad_request_is_named() {
        for (line, code, words) in [
            ("", ErrorCode::Syntax, "EOF"),
            ("status", ErrorCode::Syntax, "expected value"),
            ("[]", ErrorCode::Version, "write \"v\":1"),
            ("{\"ask\":\"status\"}", ErrorCode::Version, "write \"v\":1"),
            ("{\"v\":2,\"ask\":\"status\"}", ErrorCode::Version, "speaks version 1"),
            (
                "{\"v\":1}",
                ErrorCode::Unsupported,
                "one of status, trace, observe, reload, attach, detach",
            ),
            ("{\"v\":1,\"ask\":\"tea\"}", ErrorCode::Unsupported, "'tea'"),
            ("{\"v\":1,\"ask\":[1]}", ErrorCode::Unsupported, "one of"),
        ] {
            let error = Request::parse(line.as_bytes()).unwrap_err();
            assert_eq!(error.code, code, "{line}: {error}");
            assert!(error.message.contains(words), "{line}: {error}");
        }
        for name in Request::NAMES {
            let line = format!(
                "{{\"v\":1,\"ask\":\"{name}\",\"frame\":\"\",\"channel\":\"\",\"name\":\"\",\"most\":1}}"
            );
            assert!(Request::parse(line.as_bytes()).is_ok(), "{name}");
        }
    }

    #[test]
    fn a_line_in_pieces_is_that_of_the_whole_status() {
        // The end of the line is told from a text that looks like it.
        let state = "\"middleboxes\":[]}}".to_string();
        for count in 0..3 {
            let one =
                |n: usize| MiddleboxStatus { mac: n.to_string(), ..MiddleboxStatus::default() };
            let middleboxes: Vec<MiddleboxStatus> = (0..count).map(one).collect();
            let head = Status { state: state.clone(), ..Status::default() };
            let mut line = StatusLine::new(head.clone(), 0);
            middleboxes.iter().for_each(|middlebox| line.push(middlebox));
            let whole = Answer::Status(Box::new(Status { middleboxes, ..head })).to_line();
            assert_eq!(String::from_utf8(line.finish()).unwrap(), whole);
        }
    }
}
