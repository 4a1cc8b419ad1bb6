//! Probing what this kernel supports.

use super::super::model::{Chain, Family, Rule, Statement};
use super::super::sys::{Batch, DumpRequest, TableFlags};
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
        if !had_table {
            batch.add_table(family, TableFlags::NONE);
        }
        batch.add_chain(family, "probe", &Chain::default());
        let rule = Rule { statements: vec![statement.clone()], comment: None };
        batch.add_rule(family, "probe", &rule);
        batch.flush_rules(family, Some("probe"));
        batch.delete_chain(family, "probe");
        if !had_table {
            batch.delete_table(family);
        }
        self.accepts(batch)
    }

    /// Whether the kernel accepts a transaction, as opposed to not knowing what is in it.
    fn accepts(&mut self, batch: Batch) -> Result<bool, KernelError> {
        match self.commit(batch) {
            Ok(()) => Ok(true),
            Err(KernelError::Refused {
                errno: Errno::ENOENT | Errno::EOPNOTSUPP | Errno::EAFNOSUPPORT | Errno::EINVAL,
                ..
            }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Returns the flags that our table is to have: protected against other programs, where the
    /// kernel can do that. One that was made without keeps what it has.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub(super) fn table_flags(
        &mut self,
        family: Family,
        exists: bool,
    ) -> Result<TableFlags, KernelError> {
        if exists {
            let flags = self.dump(&DumpRequest::Table(family))?.table_flags;
            return Ok(if flags.is_persistent() { TableFlags::OWNED } else { TableFlags::NONE });
        }
        let can_own = match self.can_own {
            Some(can_own) => can_own,
            None => {
                let mut batch = self.batch();
                batch.add_table(family, TableFlags::OWNED);
                batch.delete_table(family);
                let can_own = self.accepts(batch)?;
                *self.can_own.insert(can_own)
            }
        };
        Ok(if can_own { TableFlags::OWNED } else { TableFlags::NONE })
    }
}
