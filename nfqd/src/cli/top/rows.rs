//! The rows of `nfqd top`: counted things, with their rates and the history of these.

use crate::api::Status;
use clap::ValueEnum;
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// The kind of a row.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Kind {
    /// Middleboxes
    Middlebox,
    /// Services, with all of their backends
    Service,
    /// Backends of services
    Backend,
    /// Rules of filters
    Rule,
    /// Queues to the engine
    Queue,
}

impl Kind {
    /// Every kind, in the order of the output.
    pub(super) const ALL: [Kind; 5] =
        [Kind::Middlebox, Kind::Service, Kind::Backend, Kind::Rule, Kind::Queue];

    /// Returns the name.
    pub(super) fn name(self) -> &'static str {
        match self {
            Kind::Middlebox => "middlebox",
            Kind::Service => "service",
            Kind::Backend => "backend",
            Kind::Rule => "rule",
            Kind::Queue => "queue",
        }
    }
}

/// The order of rows.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Sort {
    /// Packets a second, most first
    Rate,
    /// Bytes a second, most first
    Bytes,
    /// Packets in all, most first
    Packets,
    /// The name
    Name,
}

impl Sort {
    /// Returns the order that follows.
    pub(super) fn next(self) -> Sort {
        match self {
            Sort::Rate => Sort::Bytes,
            Sort::Bytes => Sort::Packets,
            Sort::Packets => Sort::Name,
            Sort::Name => Sort::Rate,
        }
    }
}

/// A counted thing.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Row {
    pub kind: Kind,
    pub name: String,
    /// Packets so far.
    pub packets: u64,
    /// Bytes so far.
    pub bytes: u64,
    pub note: String,
    /// Packets a second.
    pub packet_rate: f64,
    /// Bytes a second.
    pub byte_rate: f64,
}

/// The key of a row over time.
pub(super) type Key = (Kind, String);

impl Row {
    fn new(kind: Kind, name: String, (packets, bytes): (u64, u64), note: String) -> Row {
        Row { kind, name, packets, bytes, note, packet_rate: 0.0, byte_rate: 0.0 }
    }

    /// Returns the key.
    pub(super) fn key(&self) -> Key {
        (self.kind, self.name.clone())
    }
}

/// Returns the rows of a status, without rates.
pub(super) fn rows(status: &Status) -> Vec<Row> {
    let mut out = Vec::new();
    for middlebox in &status.middleboxes {
        let mac = &middlebox.mac;
        // At the end, where a narrow screen cuts it off first.
        let network = middlebox.network.as_ref();
        let network = network.map(|network| format!(" on {network}")).unwrap_or_default();
        let counts = (middlebox.packets, middlebox.bytes);
        out.push(Row::new(Kind::Middlebox, format!("{mac}{network}"), counts, String::new()));
        for service in &middlebox.services {
            let mut all = (0, 0);
            for backend in &service.backends {
                let counts =
                    (backend.packets + backend.reply_packets, backend.bytes + backend.reply_bytes);
                all = (all.0 + counts.0, all.1 + counts.1);
                let name = format!("{mac} {} -> {}{network}", service.vip, backend.backend);
                let note = format!("{}, {} flows", backend.state.name(), backend.flows);
                out.push(Row::new(Kind::Backend, name, counts, note));
            }
            let up = service.backends.iter().filter(|backend| backend.state.name() == "up");
            let note =
                format!("{}, {} of {} up", service.method, up.count(), service.backends.len());
            out.push(Row::new(Kind::Service, format!("{mac} {}{network}", service.vip), all, note));
        }
        for rule in &middlebox.rules {
            let name = format!("{mac} {}{network}", rule.rule);
            let note = rule.not_indexed.as_ref().map(|_| "not indexed".to_string());
            let counts = (rule.packets, rule.bytes);
            out.push(Row::new(Kind::Rule, name, counts, note.unwrap_or_default()));
        }
    }
    for queue in &status.queues {
        let note = format!("{} dropped, {} overruns", queue.dropped, queue.overruns);
        out.push(Row::new(Kind::Queue, queue.queue.to_string(), (queue.packets, 0), note));
    }
    out
}

/// Sorts rows.
pub(super) fn sort(rows: &mut [Row], by: Sort) {
    match by {
        Sort::Rate => rows.sort_by(|a, b| b.packet_rate.total_cmp(&a.packet_rate)),
        Sort::Bytes => rows.sort_by(|a, b| b.byte_rate.total_cmp(&a.byte_rate)),
        Sort::Packets => rows.sort_by_key(|row| std::cmp::Reverse(row.packets)),
        Sort::Name => rows.sort_by(|a, b| a.name.cmp(&b.name)),
    }
}

/// The rows of the last status, with their rates since the one before.
#[derive(Default)]
pub(super) struct Rates {
    last: BTreeMap<Key, (u64, u64)>,
    history: BTreeMap<Key, VecDeque<u64>>,
}

/// The rates of a row that are kept.
pub(super) const HISTORY: usize = 240;
/// The most rows whose rates are kept: the first ones that had traffic.
const MAX_HISTORIES: usize = 4096;

impl Rates {
    /// Returns the rows of a status, with the rates in the time since the one before.
    pub(super) fn update(&mut self, status: &Status, elapsed: Duration) -> Vec<Row> {
        let seconds = elapsed.as_secs_f64().max(0.001);
        let rate = |now: u64, before: u64| now.checked_sub(before).unwrap_or(now) as f64 / seconds;
        let mut all = rows(status);
        for row in &mut all {
            // A row that has come meanwhile counts from its first value.
            let before = self.last.get(&row.key()).copied().unwrap_or((row.packets, row.bytes));
            row.packet_rate = rate(row.packets, before.0);
            row.byte_rate = rate(row.bytes, before.1);
        }
        self.last = all.iter().map(|row| (row.key(), (row.packets, row.bytes))).collect();
        self.history.retain(|key, rates| {
            self.last.contains_key(key) && rates.iter().any(|rate| *rate != 0)
        });
        for row in &all {
            let key = row.key();
            if row.packet_rate > 0.0 && self.history.len() < MAX_HISTORIES {
                self.history.entry(key.clone()).or_default();
            }
            if let Some(rates) = self.history.get_mut(&key) {
                rates.push_back(row.packet_rate.round() as u64);
                if rates.len() > HISTORY {
                    rates.pop_front();
                }
            }
        }
        all
    }

    /// Returns the last packet rates of a row, the oldest first.
    pub(super) fn history(&self, key: &Key) -> Vec<u64> {
        self.history.get(key).map(|rates| rates.iter().copied().collect()).unwrap_or_default()
    }
}

/// Returns a text for a count a second or a number of bytes: 1234, 12.3k, 4.5M.
pub(super) fn short(value: f64) -> String {
    const UNITS: [&str; 5] = ["", "k", "M", "G", "T"];
    let mut value = value;
    let mut unit = 0;
    while value >= 10_000.0 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    let digits = if unit == 0 { 0 } else { 1 };
    format!("{value:.digits$}{}", UNITS.get(unit).copied().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{MiddleboxStatus, QueueStatus};

    #[test]
    fn numbers_are_short() {
        let texts = [0.4, 9999.0, 12_345.0, 7_654_321.0, 1e15].map(short);
        assert_eq!(texts, ["0", "9999", "12.3k", "7654.3k", "1000.0T"]);
    }

    #[test]
    fn rates_begin_at_the_first_value_and_have_a_bounded_history() {
        let status = |packets| Status {
            queues: vec![QueueStatus { queue: 3, packets, ..QueueStatus::default() }],
            middleboxes: vec![MiddleboxStatus { mac: "m".to_string(), ..Default::default() }],
            ..Status::default()
        };
        let mut rates = Rates::default();
        let second = Duration::from_secs(1);
        let queue = |rows: Vec<Row>| rows.iter().find(|row| row.kind == Kind::Queue).cloned();
        assert_eq!(queue(rates.update(&status(7000), second)).unwrap().packet_rate, 0.0);
        for n in 1..=2 * HISTORY as u64 {
            let row = queue(rates.update(&status(7000 + n * 10), second)).unwrap();
            assert_eq!(row.packet_rate, 10.0);
        }
        let key = (Kind::Queue, "3".to_string());
        assert_eq!(rates.history(&key), vec![10; HISTORY]);
        assert!(rates.history(&(Kind::Middlebox, "m".to_string())).is_empty());
        // nfqd has been started again.
        assert_eq!(queue(rates.update(&status(5), second)).unwrap().packet_rate, 5.0);
        rates.update(&Status::default(), second);
        assert!(rates.history(&key).is_empty(), "a row that is gone");
    }
}
