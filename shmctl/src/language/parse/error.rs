//! Errors of the parser and of the policy, as replies and `nfqd check` show them.

use super::Word;
use crate::language::value::ParseValueError;
use std::fmt;
use std::str::FromStr;

/// The code of a rejection, as replies carry it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ErrorCode {
    /// The words do not form a command.
    Syntax,
    /// A word is in the right place but its value is not possible there.
    Value,
    /// The MAC is not registered for the service that the command changes.
    UnknownMac,
    /// The service has no such backend.
    UnknownBackend,
    /// The channel's binding does not allow the command.
    Denied,
    /// A limit on registrations, rules or backends is reached.
    Quota,
    /// The command is not supported by this version.
    Unsupported,
    /// The host failed; the command itself may be valid.
    Internal,
}

impl ErrorCode {
    /// Every code, with its text in replies.
    pub const ALL: [(ErrorCode, &str); 8] = [
        (ErrorCode::Syntax, "syntax"),
        (ErrorCode::Value, "value"),
        (ErrorCode::UnknownMac, "unknown-mac"),
        (ErrorCode::UnknownBackend, "unknown-backend"),
        (ErrorCode::Denied, "denied"),
        (ErrorCode::Quota, "quota"),
        (ErrorCode::Unsupported, "unsupported"),
        (ErrorCode::Internal, "internal"),
    ];

    /// Whether a reply with this code names the column of the wrong word.
    pub fn has_column(self) -> bool {
        matches!(self, ErrorCode::Syntax | ErrorCode::Value | ErrorCode::Denied)
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = ErrorCode::ALL.iter().find(|(code, _)| code == self).map(|(_, text)| *text);
        f.write_str(text.unwrap_or_default())
    }
}

impl FromStr for ErrorCode {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, ParseValueError> {
        let code = ErrorCode::ALL.iter().find(|(_, name)| *name == text).map(|(code, _)| *code);
        code.ok_or(ParseValueError)
    }
}

/// The reason a command is rejected: the word, its place, and what was expected there.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{message}")]
pub struct CommandError {
    /// The code.
    pub code: ErrorCode,
    /// The column at which the word begins, in bytes from 1.
    pub column: usize,
    /// The message: what is wrong and what to write, with the word in it.
    pub message: String,
}

impl CommandError {
    /// An error about `word`; `expected` says what is wrong with it and what to write.
    pub(super) fn new(
        code: ErrorCode,
        word: Word<'_>,
        expected: impl fmt::Display,
    ) -> CommandError {
        let message = match word.text {
            "" => format!("the command ends here: {expected}"),
            text => format!("'{}': {expected}", printable(text)),
        };
        CommandError { code, column: word.start + 1, message }
    }
}

/// Returns the word without control characters, cut behind 48 characters.
fn printable(text: &str) -> String {
    let mut out: String = text.chars().take(48).flat_map(char::escape_default).collect();
    if text.chars().nth(48).is_some() {
        out.push('…');
    }
    out
}
