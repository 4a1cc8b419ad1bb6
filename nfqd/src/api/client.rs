//! A client of the control protocol.

use super::{Answer, Request, Status};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// The time in which the daemon must answer.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Sends a request to the daemon whose socket is at `path`, and returns its answer.
///
/// # Errors
/// If no daemon answers there, or not in this protocol.
pub fn ask(path: &Path, request: &Request) -> io::Result<Answer> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    stream.write_all(request.to_line().as_bytes())?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    if line.is_empty() {
        let message = "the connection was closed without an answer";
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, message));
    }
    Answer::parse(&line).map_err(io::Error::other)
}

/// Returns the status of the daemon whose socket is at `path`.
///
/// # Errors
/// If no daemon answers there, or it answers with an error.
pub fn status(path: &Path) -> io::Result<Status> {
    match ask(path, &Request::Status)? {
        Answer::Status(status) => Ok(*status),
        Answer::Error(error) => Err(io::Error::other(error)),
        _ => Err(io::Error::other("an answer to another request")),
    }
}
