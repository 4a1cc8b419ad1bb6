//! Builders of rules and statements.

use super::field::Type;
use super::model::{Data, Rule, Set, Statement, Verdict};
use crate::mark::{OURS, OWN, Origin, upcall_bits};

pub(super) fn rule(statements: Vec<Statement>) -> Rule {
    Rule { statements, comment: None }
}

pub(super) fn commented(statements: Vec<Statement>, comment: &str) -> Rule {
    Rule { statements, comment: Some(comment.to_string()) }
}

pub(super) fn verdict(verdict: Verdict) -> Statement {
    Statement::Verdict(verdict)
}

pub(super) fn accept() -> Statement {
    verdict(Verdict::Accept)
}

pub(super) fn goto(chain: &str) -> Statement {
    verdict(Verdict::Goto(chain.to_string()))
}

pub(super) fn jump(chain: &str) -> Statement {
    verdict(Verdict::Jump(chain.to_string()))
}

/// Marks a packet for the engine. The bit [`OWN`] stays as it is.
pub(super) fn upcall(origin: Origin) -> Statement {
    Statement::SetMark { keep: !OURS | OWN, set: upcall_bits(origin) }
}

/// Removes our bits from the mark.
pub(super) fn clear_mark() -> Statement {
    Statement::SetMark { keep: !OURS, set: 0 }
}

pub(super) fn set_of(key: &[Type], data: Option<Data>, comment: &str) -> Set {
    Set { key: key.to_vec(), data, comment: Some(comment.to_string()), ..Set::default() }
}
