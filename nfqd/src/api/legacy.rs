//! The status as versions before the control protocol sent it: the same values under other keys.
//! Understood for one version.

use super::Status;
use serde_json::Value;

/// The keys that have changed: today's and the earlier one.
const KEYS: [(&str, &str); 7] = [
    ("rejected", "refused"),
    ("reply_translated", "replies"),
    ("evicted", "given_up"),
    ("evicted_established", "given_up_established"),
    ("cache_full_packets", "not_cached"),
    ("not_indexed", "one_by_one"),
    ("health_unknown_reason", "unchecked"),
];

/// Returns the status under the earlier keys, as one JSON object.
pub fn status(status: &Status) -> String {
    let value = serde_json::to_value(status).map(with_earlier_keys).unwrap_or_default();
    value.to_string()
}

fn with_earlier_keys(value: Value) -> Value {
    match value {
        Value::Object(fields) => {
            let earlier = |key: String| match KEYS.iter().find(|(today, _)| *today == key) {
                Some((_, earlier)) => earlier.to_string(),
                None => key,
            };
            let fields = fields.into_iter();
            Value::Object(fields.map(|(key, it)| (earlier(key), with_earlier_keys(it))).collect())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(with_earlier_keys).collect()),
        value => value,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{FlowTableStatus, QueueStatus};

    #[test]
    fn a_program_that_knows_the_earlier_keys_finds_them() {
        let queue = QueueStatus { rejected: 3, reply_translated: 4, ..QueueStatus::default() };
        let flows = FlowTableStatus { evicted: 5, ..FlowTableStatus::default() };
        let today = Status { queues: vec![queue], flows, ..Status::default() };
        let text = status(&today);
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["queues"][0]["refused"], 3);
        assert_eq!(value["queues"][0]["replies"], 4);
        assert_eq!(value["flows"]["given_up"], 5);
        assert!(value["flows"]["not_cached"].is_object(), "{text}");
        assert!(KEYS.iter().all(|(today, _)| !text.contains(&format!("\"{today}\""))), "{text}");
    }
}
