//! Interval sets: the elements that the kernel's sets of ranges can hold.

use super::rule_list::Matching;
use crate::nft::field::Value;
use nfqd_shmctl::RuleId;
use std::collections::BTreeMap;

/// The largest number of prefixes that the ranges of an interval set may consist of in one field:
/// the kernel keeps a bit for each, examines all of them for a packet, and takes quadratic time to
/// change one.
pub(super) const MAX_PREFIXES: usize = 2048;

/// The reason an interval set cannot hold an element.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum LimitError {
    /// The ranges overlap those of this rule.
    Overlap(RuleId),
    /// The ranges and those of the elements consist of more than [`MAX_PREFIXES`] prefixes.
    Prefixes,
}

/// An element of an interval set: from the first to the last value in every field.
pub(super) struct Ranges {
    pub first: Vec<Value>,
    pub last: Vec<Value>,
    pub rule: Matching,
}

/// The elements of an interval set, indexed by the first field.
#[derive(Default)]
pub(super) struct Interval {
    pub elements: Vec<Ranges>,
    /// The bounds of each element in every field, by its start in the first one.
    bounds: BTreeMap<(u128, usize), Vec<(u128, u128)>>,
    /// The longest range in the first field.
    longest: u128,
    /// The prefixes that the ranges consist of, field by field.
    prefixes: Vec<usize>,
}

/// Returns the number of prefixes that a range consists of.
fn prefixes(first: u128, last: u128) -> usize {
    let (mut at, mut count) = (first, 0);
    loop {
        count += 1;
        // The largest prefix that begins here and does not exceed the end.
        let room = (last - at).checked_add(1).map_or(127, u128::ilog2);
        let bits = at.trailing_zeros().min(room);
        match at
            .checked_add((1 << bits) - 1)
            .and_then(|end| if end < last { end.checked_add(1) } else { None })
        {
            Some(next) => at = next,
            None => return count,
        }
    }
}

impl Interval {
    /// Adds an element.
    ///
    /// # Errors
    /// The reason the set cannot hold it.
    pub(super) fn add(&mut self, ranges: Ranges) -> Result<(), LimitError> {
        let bounds = ranges
            .first
            .iter()
            .zip(&ranges.last)
            .map(|(first, last)| (first.number(), last.number()));
        let bounds: Vec<(u128, u128)> = bounds.collect();
        // A key without fields has no ranges.
        let Some(&(first, last)) = bounds.first() else { return Ok(()) };
        let near = (first.saturating_sub(self.longest), 0)..=(last, usize::MAX);
        let overlaps = |other: &[(u128, u128)]| {
            other.iter().zip(&bounds).all(|((a, b), (first, last))| a <= last && first <= b)
        };
        if let Some(((_, at), _)) = self.bounds.range(near).find(|(_, other)| overlaps(other)) {
            let overlapping = self.elements.get(*at);
            return overlapping.map_or(Ok(()), |other| Err(LimitError::Overlap(other.rule.0)));
        }
        self.prefixes.resize(bounds.len(), 0);
        let sums = self
            .prefixes
            .iter()
            .zip(&bounds)
            .map(|(sum, (first, last))| sum + prefixes(*first, *last));
        let sums: Vec<usize> = sums.collect();
        if sums.iter().any(|&sum| sum > MAX_PREFIXES) {
            return Err(LimitError::Prefixes);
        }
        self.prefixes = sums;
        self.longest = self.longest.max(last - first);
        self.bounds.insert((first, self.elements.len()), bounds);
        self.elements.push(ranges);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_made_of_prefixes() {
        let most = u128::MAX;
        for (first, last, count) in [
            (0, 0, 1),
            (0, 255, 1),
            (80, 90, 3),
            (1, 65534, 30),
            (0, most, 2),
            (0, most - 1, 128),
            (1, most, 128),
            (1, most - 1, 254),
            (most, most, 1),
        ] {
            assert_eq!(prefixes(first, last), count, "{first}-{last}");
        }
    }
}
