//! The mailbox at offset 0: the original's `@…@` frames, and a reply.
//!
//! Guarantee: whatever bytes the guest writes, the host copies them out once, does bounded work, and answers each
//! frame once. The layout is in the [crate]'s documentation.

use crate::balance::BackendName;
use crate::parse::MAX_COMMAND;
use crate::region::Region;
use crate::value::MacAddr;

use std::time::{Duration, Instant};

/// Bytes for commands, from offset 0.
pub const COMMAND_SIZE: usize = 2048;
/// Where the reply begins.
pub const REPLY_OFFSET: usize = 2048;
/// Bytes for the reply, its NUL included.
pub const REPLY_SIZE: usize = 2048;

/// Frames taken in one scan: a guest that fills the mailbox with `@` costs the host no more than this. Further frames of
/// the same write are taken by the next scan, and their reply is written over the first one's.
pub const MAX_FRAMES: usize = 16;

/// How long an opening `@` may stand without a closing one before it is refused.
const TORN_AFTER: Duration = Duration::from_secs(1);

const OPEN: u8 = b'@';
const TAKEN: u8 = b'$';

/// A command taken out of the mailbox, to be answered.
#[derive(Debug, PartialEq, Eq)]
pub struct Frame {
    /// The text between the marks, NUL bytes left out.
    pub text: Result<String, FrameError>,
    /// The offset of the opening `@`.
    open: usize,
    /// The offset of the closing `@`, where there is one.
    close: Option<usize>,
    /// Offsets of `$` inside: they would be taken for marks.
    dollars: Vec<usize>,
}

/// Why a frame has no text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// No closing mark came.
    #[error(
        "'@' at offset {offset} has no closing '@' within {COMMAND_SIZE} bytes and {} s; write @COMMAND@ with at \
         most {MAX_COMMAND} bytes between the marks",
        TORN_AFTER.as_secs()
    )]
    Torn {
        /// Where the opening mark stands.
        offset: usize,
    },
    /// There are bytes that are no ASCII text.
    #[error("byte {byte:#04x} at offset {offset} is not printable ASCII; commands are ASCII text")]
    NotText {
        /// The byte.
        byte: u8,
        /// Where it stands.
        offset: usize,
    },
}

/// The host's end.
#[derive(Debug, Default)]
pub struct HostMailbox {
    /// An opening mark without a closing one: its offset and when it was first seen.
    torn: Option<(usize, Instant)>,
}

impl HostMailbox {
    /// Takes the frames that are complete, oldest first, at most [`MAX_FRAMES`]. `now` lets an opening mark without a closing one time out.
    ///
    /// Each frame must be given to [`HostMailbox::reply`] before the next call, or it is taken again.
    pub fn take(&mut self, region: &Region, now: Instant) -> Vec<Frame> {
        let mut copy = [0; COMMAND_SIZE];
        region.read(0, &mut copy);
        // The common case by far: nothing there, and no allocation.
        if !copy.contains(&OPEN) {
            self.torn = None;
            return Vec::new();
        }
        let bytes: Vec<(usize, u8)> = copy.into_iter().enumerate().filter(|&(_, byte)| byte != 0).collect();
        let mut frames = Vec::new();
        let mut rest = bytes.as_slice();
        // Frames stand one behind the other from the start, blanks between them. Anything else is not begun: a writer may
        // have written its body, and will write the opening mark last.
        while let Some((&(open, mark), body)) = rest.split_first() {
            match mark {
                TAKEN => {
                    let Some(end) = body.iter().position(|&(_, byte)| byte == TAKEN) else { break };
                    rest = body.get(end + 1..).unwrap_or_default();
                }
                OPEN if frames.len() < MAX_FRAMES => {
                    let Some(end) = closing(body) else {
                        frames.extend(self.torn(open, now));
                        return frames;
                    };
                    let (text, after) = body.split_at(end);
                    let close = after.first().map(|&(offset, _)| offset);
                    let dollars = text.iter().filter(|&&(_, byte)| byte == TAKEN).map(|&(offset, _)| offset);
                    frames.push(Frame { text: read(text), open, close, dollars: dollars.collect() });
                    rest = after.get(1..).unwrap_or_default();
                }
                blank if blank.is_ascii_whitespace() => rest = body,
                _ => break,
            }
        }
        self.torn = None;
        frames
    }

    /// An opening mark without a closing one: waits for it, and after a while makes it a frame to be refused.
    fn torn(&mut self, open: usize, now: Instant) -> Option<Frame> {
        let since = self.torn.filter(|&(offset, _)| offset == open).map_or(now, |(_, since)| since);
        let expired = now.duration_since(since) >= TORN_AFTER;
        self.torn = (!expired).then_some((open, since));
        expired.then(|| Frame {
            text: Err(FrameError::Torn { offset: open }),
            open,
            close: None,
            dollars: Vec::new(),
        })
    }

    /// Writes the replies, one line a frame, then marks the frames as taken.
    pub fn reply(&mut self, region: &Region, answered: &[(Frame, String)]) {
        if answered.is_empty() {
            return;
        }
        let mut text =
            answered.iter().map(|(_, line)| line.as_str()).collect::<Vec<_>>().join("\n").into_bytes();
        text.truncate(REPLY_SIZE - 1);
        text.push(0);
        region.write(REPLY_OFFSET, &text);
        // The closing marks first: a writer that waits for its opening mark finds the whole frame free.
        for (frame, _) in answered {
            for &offset in &frame.dollars {
                region.replace(offset, TAKEN, b'.');
            }
            if let Some(close) = frame.close {
                region.replace(close, OPEN, TAKEN);
            }
            region.replace(frame.open, OPEN, TAKEN);
        }
    }
}

/// Where the mark that closes a frame stands in its body. A `@` between an IP address and a MAC belongs to a destination
/// (`10.0.0.3:80@02:00:00:00:00:03`), and so does one that only wants to: glued to an IP address and to more text, with
/// another mark behind it. One before what may become a MAC when the writer goes on leaves the frame open.
fn closing(body: &[(usize, u8)]) -> Option<usize> {
    let mut from = 0;
    // Marks that stand before MACs. What an earlier, longer command has left behind a new one's end may look like destinations
    // that go on, but is followed by the earlier one's taken mark. Then the only such mark is the end; of several nobody can
    // tell which, and the frame is never obeyed.
    let (mut first, mut only) = (None, true);
    let left_behind = |first: usize, end: usize| {
        body.get(first..end).is_some_and(|bytes| bytes.iter().any(|&(_, byte)| byte == TAKEN))
    };
    loop {
        let rest = body.get(from..)?;
        let Some(mark) = rest.iter().position(|&(_, byte)| byte == OPEN).map(|at| from + at) else {
            return first.filter(|&first| only && left_behind(first, body.len()));
        };
        let (before, after) = (body.get(..mark)?, body.get(mark + 1..)?);
        let &(offset, _) = body.get(mark)?;
        let is_text = |byte: u8| byte.is_ascii_graphic() && byte != OPEN && byte != TAKEN;
        let glued = after.first().is_some_and(|&(at, byte)| at == offset + 1 && is_text(byte));
        let reversed = before.iter().rev().map(|&(_, byte)| byte).take_while(|&byte| is_text(byte));
        let mut host: Vec<u8> = reversed.collect();
        host.reverse();
        let host = std::str::from_utf8(&host).ok().and_then(|text| text.parse::<BackendName>().ok());
        let closes = |mark: usize| match first {
            Some(first) if left_behind(first, mark) => Some(first).filter(|_| only),
            _ => Some(mark),
        };
        if !glued || host.is_none() {
            return closes(mark);
        }
        let word: String = after.iter().take(18).map(|&(_, byte)| char::from(byte)).collect();
        let digits = word.find(|c: char| !c.is_ascii_hexdigit() && c != ':').unwrap_or(word.len());
        let is_mac = word.get(..digits).is_some_and(|text| text.parse::<MacAddr>().is_ok());
        let may_go_on = digits == after.len();
        let mut same_word =
            after.iter().map(|&(_, byte)| byte).take_while(|&byte| is_text(byte) || byte == OPEN);
        let another = same_word.any(|byte| byte == OPEN);
        if !(is_mac || may_go_on || another) {
            return closes(mark);
        }
        only = first.is_none();
        first = first.or(Some(mark));
        from = mark + 1;
    }
}

/// The text of a frame.
fn read(body: &[(usize, u8)]) -> Result<String, FrameError> {
    let is_text = |byte: u8| byte == b'\t' || (b' '..=b'~').contains(&byte);
    match body.iter().find(|&&(_, byte)| !is_text(byte)) {
        Some(&(offset, byte)) => Err(FrameError::NotText { byte, offset }),
        None => Ok(body.iter().map(|&(_, byte)| char::from(byte)).collect()),
    }
}

/// Why a guest got no reply.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SendError {
    /// Not a frame.
    #[error("'{0}' is not a frame; write @COMMAND@ with at most {MAX_COMMAND} bytes between the marks")]
    NotAFrame(String),
    /// An earlier command still stands in the mailbox.
    #[error(
        "an earlier command still waits in the mailbox; is nfqd running on the host, with this region as --shm?"
    )]
    Busy,
    /// Nobody took the command.
    #[error("nobody took the command within {} s; is nfqd running on the host, with this region as --shm?", .0.as_secs_f32())]
    Timeout(Duration),
}

/// Writes one `@…@` frame, waits for it to be taken and returns the reply. A frame that nobody takes within `timeout`
/// is withdrawn, so that it is not obeyed later.
///
/// # Errors
/// See [`SendError`].
pub fn send_frame(region: &Region, frame: &str, timeout: Duration) -> Result<String, SendError> {
    let bytes = frame.as_bytes();
    let framed = bytes.len() >= 2 && bytes.first() == Some(&OPEN) && bytes.last() == Some(&OPEN);
    if !framed || bytes.len() > COMMAND_SIZE {
        return Err(SendError::NotAFrame(frame.to_string()));
    }
    let deadline = Instant::now() + timeout;
    let wait_until_taken = |marks: &[usize]| {
        let mut pause = Duration::from_micros(20);
        while marks.iter().any(|&at| region.load(at) == OPEN) {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(5));
        }
        true
    };
    if !wait_until_taken(&[0]) {
        return Err(SendError::Busy);
    }
    // Old text behind the frame must not be read as part of a later one.
    let mut rest = bytes.get(1..).unwrap_or_default().to_vec();
    rest.resize(COMMAND_SIZE - 1, 0);
    region.store(0, 0);
    region.write(1, &rest);
    region.store(0, OPEN);
    let close = bytes.len() - 1;
    if wait_until_taken(&[0, close]) {
        return Ok(reply(region));
    }
    if region.replace(0, OPEN, 0) {
        region.replace(close, OPEN, 0);
        return Err(SendError::Timeout(timeout));
    }
    Ok(reply(region))
}

/// Sends one command, see [`send_frame`].
///
/// # Errors
/// See [`SendError`].
pub fn send_command(region: &Region, command: &str, timeout: Duration) -> Result<String, SendError> {
    send_frame(region, &format!("@{command}@"), timeout)
}

fn reply(region: &Region) -> String {
    let mut bytes = [0; REPLY_SIZE];
    region.read(REPLY_OFFSET, &mut bytes);
    let text = bytes.split(|&byte| byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn region() -> (tempfile::TempDir, Region) {
        let dir = tempfile::tempdir().unwrap();
        let region = Region::open_or_create(&dir.path().join("region")).unwrap();
        (dir, region)
    }

    fn texts(frames: &[Frame]) -> Vec<&str> {
        frames.iter().map(|frame| frame.text.as_deref().unwrap()).collect()
    }

    fn answer(mailbox: &mut HostMailbox, region: &Region, frames: Vec<Frame>) {
        let answered: Vec<_> = frames.into_iter().enumerate().map(|(n, f)| (f, format!("OK {n}"))).collect();
        mailbox.reply(region, &answered);
    }

    fn bytes(region: &Region, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        region.read(0, &mut out);
        out
    }

    #[test]
    fn a_frame_is_taken_marked_and_answered() {
        let (_dir, region) = region();
        let mut mailbox = HostMailbox::default();
        region.write(0, b"@R F 12:13:14:15:16:17 10.129.126.15@");
        let frames = mailbox.take(&region, Instant::now());
        assert_eq!(texts(&frames), ["R F 12:13:14:15:16:17 10.129.126.15"]);
        answer(&mut mailbox, &region, frames);
        assert_eq!(bytes(&region, 37), b"$R F 12:13:14:15:16:17 10.129.126.15$");
        assert_eq!(reply(&region), "OK 0");
        assert_eq!(mailbox.take(&region, Instant::now()), []);
    }

    #[test]
    fn nuls_are_skipped_and_two_commands_in_one_write_are_two() {
        let (_dir, region) = region();
        let mut mailbox = HostMailbox::default();
        region.write(0, b"\0\0@X\0 1:2:3:4:5:6\0@\n@D 1:2:3:4:5:6 #2@ junk@X@");
        let frames = mailbox.take(&region, Instant::now());
        assert_eq!(texts(&frames), ["X 1:2:3:4:5:6", "D 1:2:3:4:5:6 #2"]);
        answer(&mut mailbox, &region, frames);
        assert_eq!(bytes(&region, 46), b"\0\0$X\0 1:2:3:4:5:6\0$\n$D 1:2:3:4:5:6 #2$ junk@X@");
        assert_eq!(reply(&region), "OK 0\nOK 1");
    }

    #[test]
    fn the_mac_of_a_destination_does_not_end_the_frame() {
        let (_dir, region) = region();
        let mut mailbox = HostMailbox::default();
        let command = "R L 2:0:0:0:0:1 10.0.0.1 0 10.0.0.3@2:0:0:0:0:3";
        region.write(0, format!("@{command}@@X 2:0:0:0:0:1@").as_bytes());
        assert_eq!(texts(&mailbox.take(&region, Instant::now())), [command, "X 2:0:0:0:0:1"]);
        let pool =
            "R L 2:0:0:0:0:1 [2001:db8::1]:80 rr [2001:db8::2]:81@2:0:0:0:0:2*3 2001:db8::3@2:0:0:0:0:3 dsr";
        region.write(0, &[0; COMMAND_SIZE]);
        let other = "B 2:0:0:0:0:1 + 10.0.0.4:80@2:0:0:0:0:4*2";
        region.write(0, format!("@{pool}@@{other}@").as_bytes());
        assert_eq!(texts(&mailbox.take(&region, Instant::now())), [pool, other]);
        // Nor does one that is mistyped: the command is refused, not cut.
        let mistyped = "R L 2:0:0:0:0:1 10.0.0.1 0 10.0.0.3@2:0:0:zz";
        region.write(0, &[0; COMMAND_SIZE]);
        region.write(0, format!("@{mistyped}@").as_bytes());
        assert_eq!(texts(&mailbox.take(&region, Instant::now())), [mistyped]);
        // A writer that is in the middle of that MAC has not ended its frame.
        region.write(0, &[0; COMMAND_SIZE]);
        region.write(0, b"@R L 2:0:0:0:0:1 10.0.0.1 0 10.0.0.3@2:0:0");
        assert_eq!(mailbox.take(&region, Instant::now()), []);
    }

    #[test]
    fn what_an_earlier_command_left_is_no_part_of_a_later_one() {
        let (_dir, region) = region();
        let mut mailbox = HostMailbox::default();
        let long = "R L 12:13:14:15:16:17 10.129.126.15 0 10.129.126.17@02:00:00:00:00:17";
        for short in [
            "R F 12:13:14:15:16:17 10.129.126.15",
            "R L 12:13:14:15:16:17 10.129.126.15 0 10.129.126.18",
            "R L 12:13:14:15:16:17 10.129.126.15 0 10.129.126.1",
            "X 12:13:14:15:16:17",
        ] {
            for command in [long, short] {
                // As the original wrote: no NUL behind it.
                region.write(0, format!("@{command}@").as_bytes());
                let frames = mailbox.take(&region, Instant::now());
                assert_eq!(texts(&frames), [command]);
                answer(&mut mailbox, &region, frames);
            }
        }
    }

    #[test]
    fn backends_of_an_earlier_command_are_no_part_of_a_later_one() {
        let (_dir, region) = region();
        let mut mailbox = HostMailbox::default();
        let (three, four) = ("10.0.0.3@02:00:00:00:00:03", "10.0.0.4@02:00:00:00:00:04");
        let long = format!("B 2:0:0:0:0:1 + {three}*7 10.0.0.5");
        for short in ["B 2:0:0:0:0:1 - 10.0.0.3", "X 2:0:0:0:0:1"] {
            for command in [long.as_str(), short] {
                region.write(0, format!("@{command}@").as_bytes());
                let frames = mailbox.take(&region, Instant::now());
                assert_eq!(texts(&frames), [command]);
                answer(&mut mailbox, &region, frames);
            }
        }
        // Where nobody can tell, nothing is obeyed: the writer is told that its frame is torn.
        let long = format!("B 2:0:0:0:0:1 + {three} {four}");
        for short in ["B 2:0:0:0:0:1 - 10.0.0.3", "B 2:0:0:0:0:1 + 10.0.0.3@02:00:00:00:00:03 10.0.0.4"] {
            region.write(0, &[0; COMMAND_SIZE]);
            region.write(0, format!("@{long}@").as_bytes());
            let frames = mailbox.take(&region, Instant::now());
            assert_eq!(texts(&frames), [long.as_str()]);
            answer(&mut mailbox, &region, frames);
            region.write(0, format!("@{short}@").as_bytes());
            let now = Instant::now();
            assert_eq!(mailbox.take(&region, now), []);
            let frames = mailbox.take(&region, now + TORN_AFTER * 2);
            assert!(frames.iter().all(|frame| frame.text.is_err()), "{short}: {frames:?}");
            answer(&mut mailbox, &region, frames);
        }
    }

    #[test]
    fn a_dollar_inside_a_command_is_no_mark() {
        let (_dir, region) = region();
        let mut mailbox = HostMailbox::default();
        let commands: String = (0..20).map(|n| format!("@X $ {n}@")).collect();
        region.write(0, commands.as_bytes());
        let mut taken = 0;
        for _ in 0..3 {
            let frames = mailbox.take(&region, Instant::now());
            taken += frames.len();
            answer(&mut mailbox, &region, frames);
        }
        assert_eq!(taken, 20);
    }

    #[test]
    fn a_body_without_its_opening_mark_is_not_begun() {
        let (_dir, region) = region();
        let mut mailbox = HostMailbox::default();
        let body = b"R L 2:0:0:0:0:1 10.0.0.1 0 10.0.0.3@2:0:0:0:0:3@";
        for first in [0, b'$'] {
            region.store(0, first);
            region.write(1, body);
            assert_eq!(mailbox.take(&region, Instant::now()), []);
        }
        region.store(0, b'@');
        assert_eq!(mailbox.take(&region, Instant::now()).len(), 1);
    }

    #[test]
    fn a_torn_frame_waits_and_then_is_refused() {
        let (_dir, region) = region();
        let mut mailbox = HostMailbox::default();
        let start = Instant::now();
        region.write(0, b"@X 1:2:3");
        assert_eq!(mailbox.take(&region, start), []);
        assert_eq!(mailbox.take(&region, start + TORN_AFTER / 2), []);
        region.write(8, b":4:5:6@");
        assert_eq!(texts(&mailbox.take(&region, start + TORN_AFTER)), ["X 1:2:3:4:5:6"]);
        // Overlong: no closing mark in all of the command area.
        region.write(0, &[b'x'; COMMAND_SIZE]);
        region.write(0, b"@");
        assert_eq!(mailbox.take(&region, start), []);
        let frames = mailbox.take(&region, start + TORN_AFTER);
        assert_eq!(
            frames.iter().map(|f| f.text.clone()).collect::<Vec<_>>(),
            [Err(FrameError::Torn { offset: 0 })]
        );
        answer(&mut mailbox, &region, frames);
        assert_eq!(region.load(0), b'$');
        assert_eq!(mailbox.take(&region, start + TORN_AFTER * 3), []);
    }

    #[test]
    fn both_ends_meet() {
        let (_dir, region) = region();
        let timeout = Duration::from_millis(30);
        assert_eq!(send_command(&region, "Q", timeout), Err(SendError::Timeout(timeout)));
        assert!(matches!(send_frame(&region, "X 1:2:3:4:5:6", timeout), Err(SendError::NotAFrame(_))));
        // What timed out was withdrawn.
        assert_eq!(HostMailbox::default().take(&region, Instant::now()), []);
        let got = std::thread::scope(|scope| {
            let guest = scope.spawn(|| {
                (0..50)
                    .map(|n| send_command(&region, &format!("X {n}"), Duration::from_secs(20)))
                    .collect::<Vec<_>>()
            });
            let mut mailbox = HostMailbox::default();
            while !guest.is_finished() {
                let frames = mailbox.take(&region, Instant::now());
                let answered: Vec<_> = frames
                    .into_iter()
                    .map(|f| {
                        let text = f.text.clone().unwrap();
                        (f, format!("OK {text}"))
                    })
                    .collect();
                mailbox.reply(&region, &answered);
                std::thread::sleep(Duration::from_micros(50));
            }
            guest.join().unwrap()
        });
        let expected: Vec<_> = (0..50).map(|n| Ok(format!("OK X {n}"))).collect();
        assert_eq!(got, expected);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]

        #[test]
        fn garbage_ends(garbage in proptest::collection::vec(prop_oneof![any::<u8>(), Just(b'@'), Just(b':')], COMMAND_SIZE)) {
            let (_dir, region) = region();
            let mut mailbox = HostMailbox::default();
            region.write(0, &garbage);
            let start = Instant::now();
            // Every scan but the two that wait for a torn frame takes at least one mark away.
            for scan in 0..COMMAND_SIZE as u32 {
                let frames = mailbox.take(&region, start + TORN_AFTER * scan);
                prop_assert!(frames.len() <= MAX_FRAMES);
                answer(&mut mailbox, &region, frames);
            }
            // The next writer finds its place.
            let rest = mailbox.take(&region, start + TORN_AFTER * COMMAND_SIZE as u32);
            prop_assert_eq!(rest, []);
            region.write(0, b"@X 1:2:3:4:5:6@");
            let frames = mailbox.take(&region, start);
            prop_assert_eq!(frames[0].text.as_deref(), Ok("X 1:2:3:4:5:6"));
        }
    }
}
