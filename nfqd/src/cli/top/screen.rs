//! The screen of `nfqd top` on a terminal.

use super::rows::{HISTORY, Key, Kind, Rates, Row, Sort, short, sort};
use crate::api::{Status, first_line};
use ratatui::Frame;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Cell, Paragraph, Row as TableRow, Sparkline, Table, TableState};
use std::time::Duration;

/// The keys, in the order in which they are shown.
const KEYS: &str = "Tab kind  s sort  / filter  up down select  p pause  q quit";

/// The most rows of the table: a filter finds the others.
const MAX_ROWS: usize = 1000;

/// The state of the screen.
pub(super) struct Screen {
    rates: Rates,
    rows: Vec<Row>,
    /// The first line of the status, or the reason there is none.
    headline: String,
    is_wrong: bool,
    /// The kind that is shown; all if there is none.
    kind: Option<Kind>,
    sort: Sort,
    filter: String,
    /// Whether what is typed goes to the filter.
    is_typing: bool,
    is_paused: bool,
    /// The selected row, which stays selected when the order changes.
    selected: Option<Key>,
    table: TableState,
}

/// The user's wish after a key.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Wish {
    GoOn,
    Quit,
}

impl Screen {
    /// A screen without a status.
    pub(super) fn new(sort: Sort, filter: &str, kind: Option<Kind>) -> Screen {
        Screen {
            rates: Rates::default(),
            rows: Vec::new(),
            headline: String::new(),
            is_wrong: false,
            kind,
            sort,
            filter: filter.to_string(),
            is_typing: false,
            is_paused: false,
            selected: None,
            table: TableState::default(),
        }
    }

    /// Takes a status over, unless it is paused.
    pub(super) fn update(&mut self, status: &Status, elapsed: Duration) {
        let rows = self.rates.update(status, elapsed);
        if self.is_paused {
            return;
        }
        self.rows = rows;
        let problems = status.problems();
        self.is_wrong = !problems.is_empty();
        self.headline = first_line(&problems).trim_end().to_string();
    }

    /// Shows why there is no status.
    pub(super) fn fail(&mut self, reason: &str) {
        (self.headline, self.is_wrong) = (reason.to_string(), true);
    }

    /// Handles a key.
    pub(super) fn press(&mut self, key: KeyEvent) -> Wish {
        let is_interrupt =
            key.modifiers.contains(KeyModifiers::CONTROL) && key.code == KeyCode::Char('c');
        if is_interrupt {
            return Wish::Quit;
        }
        if self.is_typing {
            match key.code {
                KeyCode::Enter => self.is_typing = false,
                KeyCode::Esc => (self.is_typing, self.filter) = (false, String::new()),
                KeyCode::Backspace => drop(self.filter.pop()),
                KeyCode::Char(letter) => self.filter.push(letter),
                _ => {}
            }
            return Wish::GoOn;
        }
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return Wish::Quit,
            KeyCode::Char('s') => self.sort = self.sort.next(),
            KeyCode::Char('/') => self.is_typing = true,
            KeyCode::Char('p') => self.is_paused = !self.is_paused,
            KeyCode::Tab => self.kind = next_kind(self.kind),
            KeyCode::Down | KeyCode::Char('j') => self.select(1),
            KeyCode::Up | KeyCode::Char('k') => self.select(-1),
            KeyCode::PageDown => self.select(20),
            KeyCode::PageUp => self.select(-20),
            KeyCode::Home => self.selected = self.shown().first().map(Row::key),
            _ => {}
        }
        Wish::GoOn
    }

    fn select(&mut self, by: isize) {
        let shown = self.shown();
        let at = |row: &Row| Some(row.key()) == self.selected;
        let last = shown.len().saturating_sub(1);
        let next = match shown.iter().position(at) {
            Some(at) => at.saturating_add_signed(by).min(last),
            None => 0,
        };
        self.selected = shown.get(next).map(Row::key);
    }

    /// Returns the rows of the kind that match the filter, in order.
    fn shown(&self) -> Vec<Row> {
        let is_shown = |row: &&Row| {
            self.kind.is_none_or(|kind| kind == row.kind) && row.name.contains(&self.filter)
        };
        let mut rows: Vec<Row> = self.rows.iter().filter(is_shown).cloned().collect();
        sort(&mut rows, self.sort);
        rows
    }

    /// Draws everything.
    pub(super) fn draw(&mut self, frame: &mut Frame<'_>) {
        let shown = self.shown();
        let selected = shown.iter().position(|row| Some(row.key()) == self.selected);
        // The first row stands in for a selection that is missing.
        let selected = selected.or(if shown.is_empty() { None } else { Some(0) });
        let areas = Layout::vertical([
            Constraint::Length(2),
            Constraint::Min(3),
            Constraint::Length(6),
            Constraint::Length(1),
        ]);
        let [head, body, chart, foot] = areas.areas(frame.area());
        frame.render_widget(self.head(), head);
        self.table.select(selected);
        let kind = self.kind.map_or("all", Kind::name);
        frame.render_stateful_widget(table(&shown, self.sort, kind), body, &mut self.table);
        if let Some(row) = selected.and_then(|at| shown.get(at)) {
            let rates = self.rates.history(&row.key());
            // The newest ones are at the right.
            let room = usize::from(chart.width).min(HISTORY);
            let newest: Vec<u64> = rates.iter().rev().take(room).rev().copied().collect();
            let title = format!("{} {}: packets a second", row.kind.name(), row.name);
            let block = Block::bordered().title(title);
            frame.render_widget(Sparkline::default().data(&newest).block(block), chart);
        }
        frame.render_widget(Paragraph::new(self.foot()), foot);
    }

    fn head(&self) -> Paragraph<'_> {
        let color = if self.is_wrong { Color::Red } else { Color::Green };
        let headline = Line::styled(self.headline.as_str(), Style::new().fg(color));
        let queued: f64 =
            self.rows.iter().filter(|row| row.kind == Kind::Queue).map(|row| row.packet_rate).sum();
        let all: f64 = self
            .rows
            .iter()
            .filter(|row| row.kind == Kind::Middlebox)
            .map(|row| row.packet_rate)
            .sum();
        let rates = format!(
            "{} packets a second to middleboxes, {} through the engine",
            short(all),
            short(queued)
        );
        Paragraph::new(vec![headline, Line::from(rates)])
    }

    fn foot(&self) -> Line<'_> {
        if self.is_typing {
            return Line::from(format!(
                "filter: {}_  (Enter keeps it, Esc clears it)",
                self.filter
            ));
        }
        let mut parts = vec![Span::raw(KEYS)];
        if !self.filter.is_empty() {
            parts.push(Span::raw(format!("  filter: {}", self.filter)));
        }
        if self.is_paused {
            parts.push(Span::styled("  PAUSED", Style::new().add_modifier(Modifier::BOLD)));
        }
        Line::from(parts)
    }
}

fn next_kind(kind: Option<Kind>) -> Option<Kind> {
    let Some(kind) = kind else { return Kind::ALL.first().copied() };
    let at = Kind::ALL.iter().position(|its| *its == kind);
    at.and_then(|at| Kind::ALL.get(at + 1).copied())
}

fn table(rows: &[Row], by: Sort, kind: &str) -> Table<'static> {
    let mark = |name: &str, of: Sort| if of == by { format!("{name} v") } else { name.to_string() };
    let titles = [
        mark("packets/s", Sort::Rate),
        mark("bytes/s", Sort::Bytes),
        mark("packets", Sort::Packets),
    ];
    let right = |text: String| Cell::from(Line::from(text).right_aligned());
    let mut header = vec![Cell::from("kind"), Cell::from(mark("name", Sort::Name))];
    header.extend(titles.map(right));
    header.push(Cell::from(""));
    let row = |row: &Row| {
        let counts = [row.packet_rate, row.byte_rate, row.packets as f64];
        let mut cells = vec![Cell::from(row.kind.name()), Cell::from(row.name.clone())];
        cells.extend(counts.map(|count| right(short(count))));
        cells.push(Cell::from(row.note.clone()));
        TableRow::new(cells)
    };
    let widths = [
        Constraint::Length(9),
        Constraint::Fill(1),
        Constraint::Length(11),
        Constraint::Length(9),
        Constraint::Length(9),
        Constraint::Length(20),
    ];
    let title = format!("{kind}: {} rows", rows.len());
    Table::new(rows.iter().take(MAX_ROWS).map(row), widths)
        .header(TableRow::new(header).style(Style::new().add_modifier(Modifier::BOLD)))
        .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED))
        .block(Block::bordered().title(title))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{MiddleboxStatus, QueueStatus, RuleStatus};
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn status(packets: u64) -> Status {
        let rule = |rule: &str, packets| RuleStatus {
            rule: rule.to_string(),
            packets,
            bytes: 0,
            not_indexed: None,
        };
        let middlebox = |mac: &str, packets| MiddleboxStatus {
            mac: mac.to_string(),
            packets,
            rules: vec![rule("#1", packets / 2), rule("+7", 5)],
            ..MiddleboxStatus::default()
        };
        Status {
            queues: vec![QueueStatus { alive: true, packets: 3, ..QueueStatus::default() }],
            middleboxes: vec![middlebox("02:01", packets), middlebox("02:02", packets * 3)],
            ..Status::default()
        }
    }

    fn screen() -> Screen {
        let mut screen = Screen::new(Sort::Rate, "", None);
        screen.update(&status(100), Duration::from_secs(1));
        screen.update(&status(300), Duration::from_secs(1));
        screen
    }

    fn press(screen: &mut Screen, keys: &str) -> Wish {
        let codes = keys.chars().map(|key| match key {
            '\t' => KeyCode::Tab,
            '\n' => KeyCode::Enter,
            'v' => KeyCode::Down,
            key => KeyCode::Char(key),
        });
        codes.map(|code| screen.press(KeyEvent::from(code))).last().unwrap()
    }

    fn text(screen: &mut Screen) -> String {
        let mut terminal = Terminal::new(TestBackend::new(100, 20)).unwrap();
        terminal.draw(|frame| screen.draw(frame)).unwrap();
        terminal.backend().to_string()
    }

    fn names(screen: &Screen) -> Vec<String> {
        screen.shown().iter().map(|row| row.name.clone()).collect()
    }

    #[test]
    fn keys_choose_the_kind_the_order_and_the_filter() {
        let mut screen = screen();
        assert_eq!(names(&screen)[..3], ["02:02", "02:02 #1", "02:01"]);
        press(&mut screen, "\t");
        assert_eq!(names(&screen), ["02:02", "02:01"], "middleboxes alone");
        press(&mut screen, "sss");
        assert_eq!(
            (screen.sort, names(&screen).as_slice()),
            (Sort::Name, ["02:01", "02:02"].map(str::to_string).as_slice())
        );
        // A letter that is typed into the filter is no command.
        press(&mut screen, "\t\t\t/q");
        assert!(text(&mut screen).contains("filter: q_"));
        screen.press(KeyEvent::from(KeyCode::Backspace));
        press(&mut screen, "02:02 #\n");
        assert_eq!(names(&screen), ["02:02 #1"]);
        assert_eq!(press(&mut screen, "q"), Wish::Quit);
    }

    #[test]
    fn the_selected_row_has_a_chart_and_stays_selected() {
        let mut screen = screen();
        press(&mut screen, "\tvv");
        assert!(text(&mut screen).contains("middlebox 02:01: packets a second"));
        press(&mut screen, "sss");
        let drawn = text(&mut screen);
        assert!(drawn.contains("middlebox 02:01: packets a second"), "{drawn}");
        assert!(drawn.contains("name v") && drawn.contains("middlebox: 2 rows"), "{drawn}");
        // 200 packets in the last second.
        assert!(drawn.contains("200") && drawn.contains('█'), "{drawn}");
    }

    #[test]
    fn a_pause_keeps_what_is_shown_and_a_failure_is_said() {
        let mut screen = screen();
        press(&mut screen, "p");
        screen.update(&status(9000), Duration::from_secs(1));
        assert!(screen.rows.iter().all(|row| row.packets < 9000));
        assert!(text(&mut screen).contains("PAUSED"));
        screen.fail("nfqd does not answer");
        assert!(text(&mut screen).contains("nfqd does not answer"));
        // A small terminal is no reason to fail.
        let mut terminal = Terminal::new(TestBackend::new(7, 3)).unwrap();
        terminal.draw(|frame| screen.draw(frame)).unwrap();
    }
}
