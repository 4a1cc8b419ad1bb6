//! Replies to commands: `OK[ {text}]`, or `ERR {code} [column {n}: ]{text}`.
//!
//! A reply is one line. The daemon writes it and the guest parses it with the same type.

use super::parse::error::{CommandError, ErrorCode};
use super::value::ParseValueError;
use std::fmt;
use std::str::FromStr;

/// The host's answer to one command.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Reply {
    /// `OK`, and what the host did or knows, if there is anything to say.
    Ok(String),
    /// `ERR`: the command changed nothing.
    Err(Rejection),
}

/// The reason a command was rejected, as a reply carries it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rejection {
    code: ErrorCode,
    column: Option<usize>,
    message: String,
}

impl Reply {
    /// A reply that accepts the command.
    pub fn ok(text: &str) -> Reply {
        Reply::Ok(one_line(text))
    }

    /// A reply that rejects the command without pointing at a word.
    pub fn error(code: ErrorCode, message: &str) -> Reply {
        Reply::Err(Rejection { code, column: None, message: one_line(message) })
    }

    /// Returns the code of a rejection.
    pub fn code(&self) -> Option<ErrorCode> {
        match self {
            Reply::Ok(_) => None,
            Reply::Err(rejection) => Some(rejection.code),
        }
    }

    /// Whether the command was accepted.
    pub fn is_ok(&self) -> bool {
        matches!(self, Reply::Ok(_))
    }
}

impl Rejection {
    /// The code.
    pub fn code(&self) -> ErrorCode {
        self.code
    }

    /// The column at which the wrong word begins, in bytes from 1. Only `syntax`, `value` and
    /// `denied` have one, and not if the text between the marks could not be read at all.
    pub fn column(&self) -> Option<usize> {
        self.column
    }

    /// The message: what is wrong and what to do.
    pub fn message(&self) -> &str {
        &self.message
    }
}

/// Returns the text with control characters, line ends among them, replaced by blanks, and without
/// blanks around it.
fn one_line(text: &str) -> String {
    text.replace(char::is_control, " ").trim().to_string()
}

impl From<CommandError> for Reply {
    fn from(error: CommandError) -> Reply {
        let column = error.code.has_column().then_some(error.column);
        Reply::Err(Rejection { code: error.code, column, message: one_line(&error.message) })
    }
}

impl fmt::Display for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reply::Ok(text) if text.is_empty() => f.write_str("OK"),
            Reply::Ok(text) => write!(f, "OK {text}"),
            Reply::Err(rejection) => write!(f, "ERR {rejection}"),
        }
    }
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.column {
            Some(column) => write!(f, "{} column {column}: {}", self.code, self.message),
            None => write!(f, "{} {}", self.code, self.message),
        }
    }
}

/// Parses one line that [`Display`](fmt::Display) has written.
impl FromStr for Reply {
    type Err = ParseValueError;

    fn from_str(line: &str) -> Result<Reply, ParseValueError> {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        match word {
            "OK" => Ok(Reply::ok(rest)),
            "ERR" => {
                let (code, text) = rest.split_once(' ').unwrap_or((rest, ""));
                let code: ErrorCode = code.parse()?;
                let (column, message) = match split_column(text).filter(|_| code.has_column()) {
                    Some((column, message)) => (Some(column), message),
                    None => (None, text),
                };
                Ok(Reply::Err(Rejection { code, column, message: one_line(message) }))
            }
            _ => Err(ParseValueError),
        }
    }
}

fn split_column(text: &str) -> Option<(usize, &str)> {
    let (column, message) = text.strip_prefix("column ")?.split_once(": ")?;
    Some((super::value::decimal(column)?, message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Command;
    use proptest::prelude::*;

    #[test]
    fn replies_have_the_documented_form() {
        let denied = Command::parse("R G").unwrap_err();
        for (reply, text) in [
            (Reply::ok(""), "OK"),
            (Reply::ok("X 01:02:03:04:05:06 A"), "OK X 01:02:03:04:05:06 A"),
            (Reply::error(ErrorCode::Internal, "netlink:\ndown"), "ERR internal netlink: down"),
            (
                denied.into(),
                "ERR syntax column 3: 'G': not a service; write F (firewall) or L (load balancing)",
            ),
        ] {
            assert_eq!(reply.to_string(), text);
            assert_eq!(text.parse(), Ok(reply));
        }
        let unknown = CommandError {
            code: ErrorCode::UnknownMac,
            column: 3,
            message: "'2:0:0:0:0:9': not registered".to_string(),
        };
        assert_eq!(
            Reply::from(unknown).to_string(),
            "ERR unknown-mac '2:0:0:0:0:9': not registered"
        );
        for bad in ["", "OKAY", "ok", "ERR", "ERR nonsense x", "$"] {
            assert_eq!(bad.parse::<Reply>(), Err(ParseValueError), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn every_reply_is_one_line_that_parses_back(
            text in ".{0,80}", column in proptest::option::of(1..3000_usize), at in 0..ErrorCode::ALL.len()
        ) {
            let code = ErrorCode::ALL[at].0;
            // A message that begins like a column cannot be told from one; no caller writes such.
            prop_assume!(!text.trim_start().starts_with("column "));
            let column = column.filter(|_| code.has_column());
            let rejection = Rejection { code, column, message: one_line(&text) };
            for reply in [Reply::ok(&text), Reply::Err(rejection)] {
                let line = reply.to_string();
                prop_assert!(!line.contains('\n'));
                prop_assert_eq!(line.parse(), Ok(reply));
            }
        }
    }
}
