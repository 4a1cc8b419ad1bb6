//! The live page: HTML that works without a script, and cells that a script keeps current.
//!
//! All text from guests is escaped. The script and the style are files of their own, because the page
//! allows nothing else (Content-Security-Policy).

use super::rates::Rates;
use crate::api::{
    BackendState, BackendStatus, MiddleboxStatus, ObservedDecision, Status, first_line,
};
use std::fmt::Write;

/// The script, which patches cells.
pub const SCRIPT: &str = include_str!("page.js");
/// The style.
pub const STYLE: &str = include_str!("page.css");

/// The cells of the page that change, by their ids.
pub type Cells = Vec<(String, String)>;

/// The middleboxes that the page shows, and the backends; the rest is in `/api/status`.
const MAX_ROWS: usize = 2000;

/// The last decisions that the page shows.
pub const DECISIONS: usize = 12;

/// The content of the page.
#[derive(Clone, Copy, Default)]
pub struct Content<'a> {
    /// The status; `None` if the daemon does not answer.
    pub status: Option<&'a Status>,
    /// The last decisions of the engine, the oldest first.
    pub decisions: &'a [ObservedDecision],
}

/// Escapes text for HTML, in elements and quoted attributes.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for char in text.chars() {
        match char {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            other => out.push(other),
        }
    }
    out
}

/// A table under way: its HTML, and the cells that change.
#[derive(Default)]
struct Table {
    html: String,
    cells: Cells,
}

impl Table {
    fn begin(&mut self, title: &str, columns: &[&str]) {
        let heads: String = columns
            .iter()
            .map(|name| format!("<th scope=\"col\">{}</th>", escaped(name)))
            .collect();
        let _ = write!(
            self.html,
            "<section><h2>{}</h2><table><thead><tr>{heads}</tr></thead><tbody>",
            escaped(title)
        );
    }

    fn end(&mut self) {
        self.html.push_str("</tbody></table></section>");
    }

    /// A row: its id, its class, the cells that never change, and those that do.
    fn row(&mut self, id: &str, class: &str, fixed: &[String], changing: &[String]) {
        let _ = write!(self.html, "<tr class=\"{class}\">");
        for text in fixed {
            let _ = write!(self.html, "<td>{}</td>", escaped(text));
        }
        for (at, text) in changing.iter().enumerate() {
            let cell = format!("{id}-{at}");
            let _ = write!(self.html, "<td id=\"{}\">{}</td>", escaped(&cell), escaped(text));
            self.cells.push((cell, text.clone()));
        }
        self.html.push_str("</tr>");
    }
}

/// Adds the last decisions, the newest first. There are always as many rows: the script patches cells.
fn decisions(table: &mut Table, decisions: &[ObservedDecision]) {
    table.begin("Last decisions of the engine", &["Time (UTC)", "Verdict", "Packet", "Reason"]);
    for at in 0..DECISIONS {
        let one = decisions.iter().rev().nth(at);
        let cells = one.map_or_else(Default::default, |one| {
            [one.time_of_day(), one.verdict.clone(), one.packet.clone(), one.explanation()]
        });
        table.row(&format!("d-{at}"), "ok", &[], &cells);
    }
    table.end();
}

/// Returns the parts of the page below its head, and the cells that change.
fn tables(status: &Status, last: &[ObservedDecision], rates: &mut Rates) -> Table {
    let mut table = Table::default();
    table.begin(
        "Services and backends",
        &[
            "Middlebox",
            "Service",
            "Backend",
            "Status",
            "Weight",
            "Flows",
            "Packets/s in",
            "Packets/s out",
            "Bytes in",
            "Bytes out",
        ],
    );
    let services =
        status.middleboxes.iter().flat_map(|its| its.services.iter().map(move |one| (its, one)));
    let backends = services.flat_map(|(its, service)| {
        service.backends.iter().map(move |backend| (its, service.vip.as_str(), backend))
    });
    for (middlebox, vip, backend) in backends.take(MAX_ROWS) {
        backend_row(&mut table, middlebox, vip, backend, rates);
    }
    table.end();
    table.begin(
        "Middleboxes",
        &["MAC", "Network", "Packets/s", "Packets", "Bytes", "Rules", "Dropped by rules"],
    );
    for middlebox in status.middleboxes.iter().take(MAX_ROWS) {
        let id = format!("m-{}", name_of(middlebox));
        let denied: u64 = middlebox
            .rules
            .iter()
            .filter(|rule| !rule.rule.starts_with('+'))
            .map(|rule| rule.packets)
            .sum();
        let network = middlebox.network.clone().unwrap_or_else(|| "not known".to_string());
        table.row(
            &id,
            if middlebox.network_problem.is_some() { "warn" } else { "ok" },
            &[middlebox.mac.clone(), network],
            &[
                rates.of(&id, middlebox.packets),
                middlebox.packets.to_string(),
                middlebox.bytes.to_string(),
                middlebox.rules.len().to_string(),
                denied.to_string(),
            ],
        );
    }
    table.end();
    if let Some(more) = status.middleboxes.len().checked_sub(MAX_ROWS).filter(|more| *more > 0) {
        let _ = write!(
            table.html,
            "<p>and {more} more middleboxes: <a href=\"/api/status\">JSON</a></p>"
        );
    }
    table.begin("Queues", &["Queue", "Packets/s", "Packets", "Dropped", "Redirected", "Overruns"]);
    for queue in &status.queues {
        let id = format!("q-{}", queue.queue);
        table.row(
            &id,
            if queue.alive { "ok" } else { "bad" },
            &[queue.queue.to_string()],
            &[
                rates.of(&id, queue.packets),
                queue.packets.to_string(),
                queue.dropped.to_string(),
                queue.redirected.to_string(),
                queue.overruns.to_string(),
            ],
        );
    }
    table.end();
    table.begin("Flow table and channels", &["What", "State"]);
    let flows = &status.flows;
    let fill = format!("{} of {} flows, {} evicted", flows.count, flows.capacity, flows.evicted);
    table.row("flows", "ok", &["flow table".to_string()], &[fill]);
    for (at, channel) in status.channels.iter().enumerate() {
        let state = match (&channel.error, channel.connected) {
            (Some(error), _) => error.clone(),
            (None, None) => "read".to_string(),
            (None, Some(true)) => "connected".to_string(),
            (None, Some(false)) => "no VM connected".to_string(),
        };
        let class = if channel.error.is_some() { "bad" } else { "ok" };
        table.row(&format!("c-{at}"), class, std::slice::from_ref(&channel.path), &[state]);
    }
    table.end();
    decisions(&mut table, last);
    table
}

/// Returns the name of a middlebox in ids: tenants on two networks may have equal MACs.
fn name_of(middlebox: &MiddleboxStatus) -> String {
    format!("{}-{}", middlebox.network.as_deref().unwrap_or_default(), middlebox.mac)
}

fn backend_row(
    table: &mut Table,
    middlebox: &MiddleboxStatus,
    vip: &str,
    backend: &BackendStatus,
    rates: &mut Rates,
) {
    let id = format!("b-{}-{vip}-{}", name_of(middlebox), backend.backend);
    let class = match backend.state {
        BackendState::Up => "ok",
        BackendState::Draining | BackendState::Drained | BackendState::Failing => "warn",
        BackendState::Dead | BackendState::Unresolved => "bad",
    };
    table.row(
        &id,
        class,
        &[middlebox.mac.clone(), vip.to_string(), backend.backend.clone()],
        &[
            backend.state.name().to_string(),
            backend.weight.to_string(),
            backend.flows.to_string(),
            rates.of(&format!("{id}-in"), backend.packets),
            rates.of(&format!("{id}-out"), backend.reply_packets),
            backend.bytes.to_string(),
            backend.reply_bytes.to_string(),
        ],
    );
}

/// Returns the first line of the status, and whether all is well.
fn headline(status: Option<&Status>) -> (String, bool) {
    match status {
        None => ("NOT RUNNING: the daemon does not answer".to_string(), false),
        Some(status) => {
            let problems = status.problems();
            (first_line(&problems).trim().to_string(), problems.is_empty())
        }
    }
}

/// Returns the page.
pub fn html(content: Content<'_>, rates: &mut Rates) -> String {
    let (headline, is_well) = headline(content.status);
    let class = if is_well { "ok" } else { "bad" };
    let tables = content.status.map(|status| tables(status, content.decisions, rates));
    let body = tables.map(|tables| tables.html).unwrap_or_default();
    format!(
        "<!DOCTYPE html><html lang=\"en\"><head><meta charset=\"utf-8\"><title>nfqd</title>\
         <meta name=\"viewport\" content=\"width=device-width\"><link rel=\"stylesheet\" href=\"/page.css\">\
         <script src=\"/page.js\" defer></script></head><body><h1>nfqd</h1>\
         <p id=\"headline\" class=\"{class}\">{}</p>{body}\
         <footer><a href=\"/api/status\">JSON</a> <a href=\"/metrics\">metrics</a></footer></body></html>",
        escaped(&headline)
    )
}

/// Returns the cells that change, the headline among them.
pub fn cells(content: Content<'_>, rates: &mut Rates) -> Cells {
    let mut out = vec![("headline".to_string(), headline(content.status).0)];
    let tables = content.status.map(|status| tables(status, content.decisions, rates));
    out.extend(tables.map(|tables| tables.cells).unwrap_or_default());
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::ChannelStatus;
    use std::time::Instant;

    #[test]
    fn text_from_elsewhere_is_escaped() {
        let status = Status {
            channels: vec![ChannelStatus {
                path: "/dev/shm/<script>alert('1')</script>".to_string(),
                transport: "shm".to_string(),
                connected: None,
                macs: vec![],
                error: Some("<img src=x onerror=\"alert(1)\">".to_string()),
                denied: 0,
            }],
            ..Status::default()
        };
        let one = |n: u64| ObservedDecision {
            packet: format!("<script>{n}</script>"),
            ..ObservedDecision::default()
        };
        let decisions: Vec<ObservedDecision> = (0..20).map(one).collect();
        let content = Content { status: Some(&status), decisions: &decisions };
        let html = html(content, &mut Rates::new(Instant::now()));
        assert!(html.contains("&lt;script&gt;19&lt;") && !html.contains("&lt;script&gt;7&lt;"));
        assert!(!html.contains("<script>alert") && !html.contains("<img"), "{html}");
        assert!(html.contains("&lt;script&gt;alert(&#39;1&#39;)"), "{html}");
        let cells = cells(content, &mut Rates::new(Instant::now()));
        let first = cells.first().unwrap();
        assert!(first.0 == "headline" && first.1.starts_with("NOT READ: "), "{first:?}");
    }

    #[test]
    fn a_daemon_that_does_not_answer_is_said() {
        assert!(html(Content::default(), &mut Rates::new(Instant::now())).contains("NOT RUNNING"));
    }
}
