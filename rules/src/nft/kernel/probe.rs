//! Probing what this kernel supports.

use super::super::model::{Chain, Family, Rule, Statement};
use super::{Kernel, KernelError};
use nix::errno::Errno;

impl Kernel {
    /// Whether this kernel accepts a rule with this statement in a chain of this family. The rule
    /// is tried in a chain of its own, which no other program sees.
    ///
    /// # Errors
    /// If the kernel rejects it for another reason than an unknown statement.
    pub fn supports(&mut self, family: Family, statement: &Statement) -> Result<bool, KernelError> {
        let had_table = self.owns_table(family)?;
        let mut batch = self.batch();
        batch.add_table(family);
        batch.add_chain(family, "probe", &Chain::default());
        let rule = Rule { statements: vec![statement.clone()], comment: None };
        batch.add_rule(family, "probe", &rule);
        batch.flush_rules(family, Some("probe"));
        batch.delete_chain(family, "probe");
        if !had_table {
            batch.delete_table(family);
        }
        match self.commit(batch) {
            Ok(()) => Ok(true),
            Err(KernelError::Refused {
                errno: Errno::ENOENT | Errno::EOPNOTSUPP | Errno::EAFNOSUPPORT,
                ..
            }) => Ok(false),
            Err(error) => Err(error),
        }
    }
}
