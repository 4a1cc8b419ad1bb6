//! The problems that a status shows, the most important first, and its first line.

use super::{BackendState, MiddleboxStatus, ServiceStatus, Status, VERSION};

/// Returns the first line of a status: OK, or the first of its problems, and how many more there are.
pub fn first_line(problems: &[String]) -> String {
    match problems {
        [] => "OK\n".to_string(),
        [problem] => format!("{problem}\n"),
        [problem, others @ ..] => format!("{problem} (and {} more)\n", others.len()),
    }
}

impl Status {
    /// Returns the status as JSON, with the version of its schema (`docs/status.schema.json`) and its
    /// problems.
    pub fn to_json(&self) -> String {
        let mut value = serde_json::to_value(self).unwrap_or_default();
        if let Some(fields) = value.as_object_mut() {
            fields.insert("v".to_string(), VERSION.into());
            fields.insert("problems".to_string(), self.problems().into());
        }
        format!("{value:#}\n")
    }

    /// Returns what is wrong, each in one line, the most important first; nothing if all is well.
    ///
    /// A backend that is draining is not wrong, nor is a limit that the host's setup brings with it.
    pub fn problems(&self) -> Vec<String> {
        let mut out = Vec::new();
        let mut add = |what: &str, reason: &str| out.push(format!("{what}: {reason}"));
        if let Some(error) = &self.repair_error {
            add("NOT ENFORCED", error);
        }
        if let Some(error) = &self.steering_error {
            add("NOT STEERED", error);
        }
        for queue in self.queues.iter().filter(|queue| !queue.alive) {
            add("NOT SERVED", &format!("queue {}: its thread ended, see the log", queue.queue));
        }
        for channel in &self.channels {
            if let Some(error) = &channel.error {
                add("NOT READ", error);
            }
        }
        if let Some(error) = &self.state_error {
            add("NOT SAVED", error);
        }
        for path in &self.rejected {
            add("NOT RESTORED", &format!("registrations in {path}"));
        }
        for middlebox in &self.middleboxes {
            if let Some(problem) = &middlebox.network_problem {
                add("NETWORK", &format!("{}: {problem}", middlebox.mac));
            }
        }
        for middlebox in &self.middleboxes {
            if let Some(rate) = middlebox.flood {
                add("FLOOD", &format!("{}: {rate} new flows a second", middlebox.mac));
            }
        }
        let services = || {
            let of = |middlebox| services_of(middlebox).map(move |service| (middlebox, service));
            self.middleboxes.iter().flat_map(of)
        };
        for (middlebox, service) in services() {
            let name = format!("{} {}", middlebox.mac, service.vip);
            let takes = |state| matches!(state, BackendState::Up);
            if !service.backends.iter().any(|backend| takes(backend.state)) {
                add(
                    "NO BACKEND",
                    &format!("{name}: new flows are rejected or go to the middlebox"),
                );
            }
        }
        for (middlebox, service) in services() {
            if service.panic {
                add("CHECKS DOUBTED", &format!("{} {}", middlebox.mac, service.vip));
            }
            for backend in &service.backends {
                let name = format!("{} {} -> {}", middlebox.mac, service.vip, backend.backend);
                match backend.state {
                    BackendState::Dead => add("DEAD", &format!("{name} answers nothing")),
                    BackendState::Failing => add("FAILING", &format!("{name} fails its checks")),
                    BackendState::Unresolved => add("MAC UNKNOWN", &name),
                    BackendState::Up | BackendState::Draining | BackendState::Drained => {}
                }
                if let Some(problem) = &backend.network_problem {
                    add("NETWORK", &format!("{name}: {problem}"));
                }
            }
        }
        let flows = &self.flows;
        if flows.evicted_established != 0 {
            let count = flows.evicted_established;
            add("FLOW TABLE FULL", &format!("{count} established flows were evicted"));
        }
        for map in &flows.full_maps {
            add("KERNEL MAP FULL", map);
        }
        out
    }
}

fn services_of(middlebox: &MiddleboxStatus) -> impl Iterator<Item = &ServiceStatus> {
    middlebox.services.iter()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With `NFQD_WRITE_DOCS=1` it writes the schema first.
    #[test]
    fn the_schema_of_the_status_is_that_of_its_types() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/status.schema.json");
        let mut schema = schemars::schema_for!(Status);
        let fields = schema.ensure_object();
        fields.insert("title".to_string(), "nfqd status --json".into());
        let own = serde_json::json!({
            "v": { "description": "The version of the schema.", "const": VERSION },
            "problems": {
                "description": "What is wrong, the most important first.",
                "type": "array", "items": { "type": "string" },
            },
        });
        for (name, its) in own.as_object().unwrap() {
            fields["properties"][name] = its.clone();
            fields["required"].as_array_mut().unwrap().push(name.as_str().into());
        }
        let text = format!("{:#}\n", schema.as_value());
        if std::env::var_os("NFQD_WRITE_DOCS").is_some() {
            std::fs::write(path, &text).unwrap();
        }
        let found = std::fs::read_to_string(path).unwrap();
        assert_eq!(found, text, "write it by NFQD_WRITE_DOCS=1 cargo test -p nfqd schema");
        // The output has the fields that the schema requires, and no others.
        let printed: serde_json::Value =
            serde_json::from_str(&Status::default().to_json()).unwrap();
        let printed = printed.as_object().unwrap();
        let names = |of: &serde_json::Value| -> Vec<String> {
            of.as_array().unwrap().iter().map(|name| name.as_str().unwrap().to_string()).collect()
        };
        let schema = schema.as_value();
        assert!(names(&schema["required"]).iter().all(|name| printed.contains_key(name)));
        assert!(printed.keys().all(|name| schema["properties"].get(name).is_some()));
    }
}
