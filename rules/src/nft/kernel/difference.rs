//! The messages that turn one part of a ruleset into another.

use super::super::field::Value;
use super::super::model::{Family, Set, Table};
use super::super::names::SLOT_MAPS;
use super::super::sys::Batch;

/// Adds chains with their rules, and the sets that come with them.
pub(super) fn creations(batch: &mut Batch, old: &Table, new: &Table) {
    let family = new.family;
    let chains: Vec<_> =
        new.chains.iter().filter(|(name, _)| !old.chains.contains_key(*name)).collect();
    if chains.is_empty() {
        return;
    }
    for (name, chain) in &chains {
        batch.add_chain(family, name, chain);
    }
    for (name, set) in new.sets.iter().filter(|(name, _)| !old.sets.contains_key(*name)) {
        batch.add_set(family, name, set);
        batch.add_elements(family, name, &set.elements);
    }
    for (name, chain) in chains {
        chain.rules.iter().for_each(|rule| batch.add_rule(family, name, rule));
    }
}

/// The messages that follow [`creations`]. Objects that a chain's rules name must exist before the
/// rules; objects that nothing names any more are deleted last.
pub(super) fn difference(batch: &mut Batch, old: &Table, new: &Table) {
    let family = new.family;
    let created = new.chains.keys().any(|name| !old.chains.contains_key(name));
    for (name, set) in &new.sets {
        if let Some(before) = old.sets.get(name) {
            elements_difference(batch, family, name, before, set);
        } else if !created {
            batch.add_set(family, name, set);
            batch.add_elements(family, name, &set.elements);
        }
    }
    for (name, chain) in &new.chains {
        if let Some(before) = old.chains.get(name)
            && before.rules != chain.rules
        {
            batch.flush_rules(family, Some(name));
            chain.rules.iter().for_each(|rule| batch.add_rule(family, name, rule));
        }
    }
    let gone = old.chains.iter().filter(|(name, _)| !new.chains.contains_key(*name));
    let gone: Vec<&String> = gone.map(|(name, _)| name).collect();
    gone.iter().for_each(|name| batch.flush_rules(family, Some(name)));
    for name in old.sets.keys().filter(|name| !new.sets.contains_key(*name)) {
        batch.delete_set(family, name);
    }
    gone.iter().for_each(|name| batch.delete_chain(family, name));
}

fn elements_difference(batch: &mut Batch, family: Family, name: &str, old: &Set, new: &Set) {
    let old = &old.elements;
    let same = |key: &Vec<Value>| old.get(key) == new.elements.get(key);
    let waits = |key: &Vec<Value>| name.starts_with(SLOT_MAPS) && !new.elements.contains_key(key);
    batch.delete_elements(family, name, old.iter().filter(|(key, _)| !same(key) && !waits(key)));
    batch.add_elements(family, name, new.elements.iter().filter(|(key, _)| !same(key)));
}
