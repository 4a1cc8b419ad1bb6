//! The words of a line, and where those words are that later errors may be about.

use super::Word;
use super::error::{CommandError, ErrorCode};
use std::fmt;

/// A word of a command that a policy or a channel may reject.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// The MAC of the middlebox.
    Mac,
    /// The rule, or the class where the command names no rule.
    Rule,
    /// The bit value of `A` and `D`.
    Bits,
    /// The frontend of a service, or the address that `R F` registers.
    Frontend,
    /// The backend with this index among those of the command.
    Backend(usize),
}

/// The positions of the words of a parsed command.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Spans {
    mac: Option<usize>,
    rule: Option<usize>,
    bits: Option<usize>,
    frontend: Option<usize>,
    backends: Vec<usize>,
}

impl Spans {
    /// Returns the word at a place; the MAC stands in for a word that the command leaves out.
    pub(super) fn word<'a>(&self, line: &'a str, place: Place) -> Word<'a> {
        let start = match place {
            Place::Mac => self.mac,
            Place::Rule => self.rule,
            Place::Bits => self.bits,
            Place::Frontend => self.frontend,
            Place::Backend(index) => self.backends.get(index).copied(),
        };
        let start = start.or(self.mac).unwrap_or(line.len());
        let rest = line.get(start..).unwrap_or_default();
        Word { text: rest.split_ascii_whitespace().next().unwrap_or_default(), start }
    }
}

/// The words of a line, one after the other.
pub(super) struct Words<'a> {
    line: &'a str,
    at: usize,
    spans: Spans,
}

impl<'a> Words<'a> {
    pub(super) fn new(line: &'a str) -> Words<'a> {
        Words { line, at: 0, spans: Spans::default() }
    }

    pub(super) fn line(&self) -> &'a str {
        self.line
    }

    pub(super) fn into_spans(self) -> Spans {
        self.spans
    }

    pub(super) fn peek(&self) -> Option<Word<'a>> {
        let rest = self.line.get(self.at..)?.trim_ascii_start();
        let text = rest.split_ascii_whitespace().next()?;
        Some(Word { text, start: self.line.len() - rest.len() })
    }

    /// Returns an empty word behind the last one, for errors about a word that is missing.
    pub(super) fn end(&self) -> Word<'a> {
        Word { text: "", start: self.line.trim_end().len() }
    }

    /// Records that the next word is the one at `place`.
    pub(super) fn mark(&mut self, place: Place) {
        let Some(Word { start, .. }) = self.peek() else { return };
        match place {
            Place::Mac => self.spans.mac = Some(start),
            Place::Rule => self.spans.rule = Some(start),
            Place::Bits => self.spans.bits = Some(start),
            Place::Frontend => self.spans.frontend = Some(start),
            Place::Backend(_) => self.spans.backends.push(start),
        }
    }

    /// Returns the next word through `read`; a word that is missing or not read is an error of
    /// `code`.
    pub(super) fn expect<T>(
        &mut self,
        code: ErrorCode,
        expected: impl fmt::Display,
        read: impl FnOnce(&str) -> Option<T>,
    ) -> Result<T, CommandError> {
        let word = self.next();
        match word.and_then(|word| read(word.text)) {
            Some(value) => Ok(value),
            None => {
                let code = if word.is_none() { ErrorCode::Syntax } else { code };
                Err(CommandError::new(code, word.unwrap_or(self.end()), expected))
            }
        }
    }
}

impl<'a> Iterator for Words<'a> {
    type Item = Word<'a>;

    fn next(&mut self) -> Option<Word<'a>> {
        let word = self.peek()?;
        self.at = word.start + word.text.len();
        Some(word)
    }
}
