use super::guest::{send_command, send_message};
use super::host::HostMailbox;
use super::*;
use crate::language::reply::Reply;
use crate::region::Region;
use crate::region_file::{Ownership, RegionFile};
use crate::sender::{Patience, SendError};
use proptest::prelude::*;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Both sides of a region.
struct Both {
    _dir: tempfile::TempDir,
    host: RegionFile,
    guest: Region,
}

impl std::ops::Deref for Both {
    type Target = Region;

    fn deref(&self) -> &Region {
        &self.guest
    }
}

fn region() -> Both {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("region");
    let host = RegionFile::open_or_create(&path, Ownership::default()).unwrap();
    Both { host, guest: Region::open(&path).unwrap(), _dir: dir }
}

fn texts(messages: &[MailboxMessage]) -> Vec<&str> {
    messages.iter().map(|message| message.text.as_deref().unwrap()).collect()
}

fn answer(mailbox: &mut HostMailbox, region: &Both, messages: Vec<MailboxMessage>) {
    let answered: Vec<_> =
        messages.into_iter().enumerate().map(|(n, f)| (f, Reply::ok(&n.to_string()))).collect();
    mailbox.reply(&region.host, &answered).unwrap();
}

fn reply_text(region: &Region) -> String {
    let mut bytes = [0; REPLY_SIZE];
    region.read(REPLY_OFFSET, &mut bytes);
    String::from_utf8(bytes.split(|&byte| byte == 0).next().unwrap().to_vec()).unwrap()
}

fn bytes(region: &Region, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    region.read(0, &mut out);
    out
}

#[test]
fn a_message_is_taken_marked_and_answered() {
    let region = region();
    let mut mailbox = HostMailbox::default();
    region.write(0, b"@R F 12:13:14:15:16:17 10.129.126.15@");
    let messages = mailbox.take(&region.host, Instant::now()).unwrap();
    assert_eq!(texts(&messages), ["R F 12:13:14:15:16:17 10.129.126.15"]);
    answer(&mut mailbox, &region, messages);
    assert_eq!(bytes(&region, 37), b"$R F 12:13:14:15:16:17 10.129.126.15$");
    assert_eq!(reply_text(&region), "OK 0");
    assert_eq!(mailbox.take(&region.host, Instant::now()).unwrap(), []);
}

#[test]
fn nuls_are_skipped_and_two_commands_in_one_write_are_two() {
    let region = region();
    let mut mailbox = HostMailbox::default();
    region.write(0, b"\0\0@X\0 1:2:3:4:5:6\0@\n@D 1:2:3:4:5:6 #2@ junk@X@");
    let messages = mailbox.take(&region.host, Instant::now()).unwrap();
    assert_eq!(texts(&messages), ["X 1:2:3:4:5:6", "D 1:2:3:4:5:6 #2"]);
    answer(&mut mailbox, &region, messages);
    assert_eq!(bytes(&region, 46), b"\0\0$X\0 1:2:3:4:5:6\0$\n$D 1:2:3:4:5:6 #2$ junk@X@");
    assert_eq!(reply_text(&region), "OK 0\nOK 1");
}

#[test]
fn the_mac_of_a_destination_does_not_end_the_frame() {
    let region = region();
    let mut mailbox = HostMailbox::default();
    let command = "R L 2:0:0:0:0:1 10.0.0.1 0 10.0.0.3@2:0:0:0:0:3";
    region.write(0, format!("@{command}@@X 2:0:0:0:0:1@").as_bytes());
    assert_eq!(
        texts(&mailbox.take(&region.host, Instant::now()).unwrap()),
        [command, "X 2:0:0:0:0:1"]
    );
    let pool = "R L 2:0:0:0:0:1 [2001:db8::1]:80 rr [2001:db8::2]:81@2:0:0:0:0:2*3 2001:db8::3@2:0:0:0:0:3 dsr";
    region.write(0, &[0; COMMAND_SIZE]);
    let other = "B 2:0:0:0:0:1 + 10.0.0.4:80@2:0:0:0:0:4*2";
    region.write(0, format!("@{pool}@@{other}@").as_bytes());
    assert_eq!(texts(&mailbox.take(&region.host, Instant::now()).unwrap()), [pool, other]);
    // Nor does one that is mistyped: the command is rejected, not cut.
    let mistyped = "R L 2:0:0:0:0:1 10.0.0.1 0 10.0.0.3@2:0:0:zz";
    region.write(0, &[0; COMMAND_SIZE]);
    region.write(0, format!("@{mistyped}@").as_bytes());
    assert_eq!(texts(&mailbox.take(&region.host, Instant::now()).unwrap()), [mistyped]);
    // A writer that is in the middle of that MAC has not ended its frame.
    region.write(0, &[0; COMMAND_SIZE]);
    region.write(0, b"@R L 2:0:0:0:0:1 10.0.0.1 0 10.0.0.3@2:0:0");
    assert_eq!(mailbox.take(&region.host, Instant::now()).unwrap(), []);
}

#[test]
fn a_command_does_not_contain_the_rest_of_an_earlier_one() {
    let region = region();
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
            let messages = mailbox.take(&region.host, Instant::now()).unwrap();
            assert_eq!(texts(&messages), [command]);
            answer(&mut mailbox, &region, messages);
        }
    }
}

#[test]
fn backends_of_an_earlier_command_are_not_used_by_a_later_one() {
    let region = region();
    let mut mailbox = HostMailbox::default();
    let (three, four) = ("10.0.0.3@02:00:00:00:00:03", "10.0.0.4@02:00:00:00:00:04");
    let long = format!("B 2:0:0:0:0:1 + {three}*7 10.0.0.5");
    for short in ["B 2:0:0:0:0:1 - 10.0.0.3", "X 2:0:0:0:0:1"] {
        for command in [long.as_str(), short] {
            region.write(0, format!("@{command}@").as_bytes());
            let messages = mailbox.take(&region.host, Instant::now()).unwrap();
            assert_eq!(texts(&messages), [command]);
            answer(&mut mailbox, &region, messages);
        }
    }
    // An ambiguous message is not carried out: the writer is told that it is torn.
    let long = format!("B 2:0:0:0:0:1 + {three} {four}");
    for short in ["B 2:0:0:0:0:1 - 10.0.0.3", "B 2:0:0:0:0:1 + 10.0.0.3@02:00:00:00:00:03 10.0.0.4"]
    {
        region.write(0, &[0; COMMAND_SIZE]);
        region.write(0, format!("@{long}@").as_bytes());
        let messages = mailbox.take(&region.host, Instant::now()).unwrap();
        assert_eq!(texts(&messages), [long.as_str()]);
        answer(&mut mailbox, &region, messages);
        region.write(0, format!("@{short}@").as_bytes());
        let now = Instant::now();
        assert_eq!(mailbox.take(&region.host, now).unwrap(), []);
        let messages = mailbox.take(&region.host, now + UNTERMINATED_AFTER * 2).unwrap();
        assert!(messages.iter().all(|message| message.text.is_err()), "{short}: {messages:?}");
        answer(&mut mailbox, &region, messages);
    }
}

#[test]
fn a_dollar_inside_a_command_is_no_mark() {
    let region = region();
    let mut mailbox = HostMailbox::default();
    let commands: String = (0..20).map(|n| format!("@X $ {n}@")).collect();
    region.write(0, commands.as_bytes());
    let mut taken = 0;
    for _ in 0..3 {
        let messages = mailbox.take(&region.host, Instant::now()).unwrap();
        taken += messages.len();
        answer(&mut mailbox, &region, messages);
    }
    assert_eq!(taken, 20);
}

#[test]
fn a_body_without_its_opening_mark_is_not_a_message() {
    let region = region();
    let mut mailbox = HostMailbox::default();
    let body = b"R L 2:0:0:0:0:1 10.0.0.1 0 10.0.0.3@2:0:0:0:0:3@";
    for first in [0, b'$'] {
        region.store(0, first);
        region.write(1, body);
        assert_eq!(mailbox.take(&region.host, Instant::now()).unwrap(), []);
    }
    region.store(0, b'@');
    assert_eq!(mailbox.take(&region.host, Instant::now()).unwrap().len(), 1);
}

#[test]
fn a_torn_message_waits_and_is_then_rejected() {
    let region = region();
    let mut mailbox = HostMailbox::default();
    let start = Instant::now();
    region.write(0, b"@X 1:2:3");
    assert_eq!(mailbox.take(&region.host, start).unwrap(), []);
    assert_eq!(mailbox.take(&region.host, start + UNTERMINATED_AFTER / 2).unwrap(), []);
    region.write(8, b":4:5:6@");
    assert_eq!(
        texts(&mailbox.take(&region.host, start + UNTERMINATED_AFTER).unwrap()),
        ["X 1:2:3:4:5:6"]
    );
    // Overlong: no closing mark in all of the command area.
    region.write(0, &[b'x'; COMMAND_SIZE]);
    region.write(0, b"@");
    assert_eq!(mailbox.take(&region.host, start).unwrap(), []);
    let messages = mailbox.take(&region.host, start + UNTERMINATED_AFTER).unwrap();
    assert_eq!(
        messages.iter().map(|f| f.text.clone()).collect::<Vec<_>>(),
        [Err(MessageError::Unterminated { offset: 0 })]
    );
    answer(&mut mailbox, &region, messages);
    assert_eq!(region.load(0), b'$');
    assert_eq!(mailbox.take(&region.host, start + UNTERMINATED_AFTER * 3).unwrap(), []);
}

#[test]
fn both_ends_meet() {
    let region = region();
    let timeout = Duration::from_millis(30);
    assert_eq!(send_command(&region, "Q", timeout), Err(SendError::Timeout(timeout)));
    assert!(matches!(
        send_message(&region, "X 1:2:3:4:5:6", timeout),
        Err(SendError::NotAMessage(_))
    ));
    // A command that timed out was withdrawn.
    assert_eq!(HostMailbox::default().take(&region.host, Instant::now()).unwrap(), []);
    let got = std::thread::scope(|scope| {
        let guest = scope.spawn(|| {
            (0..50)
                .map(|n| send_command(&region, &format!("X {n}"), Duration::from_secs(20)))
                .collect::<Vec<_>>()
        });
        let mut mailbox = HostMailbox::default();
        while !guest.is_finished() {
            let messages = mailbox.take(&region.host, Instant::now()).unwrap();
            let answered: Vec<_> = messages
                .into_iter()
                .map(|f| {
                    let text = f.text.clone().unwrap();
                    (f, Reply::ok(&text))
                })
                .collect();
            mailbox.reply(&region.host, &answered).unwrap();
            std::thread::sleep(Duration::from_micros(50));
        }
        guest.join().unwrap()
    });
    let expected: Vec<_> = (0..50).map(|n| Ok(vec![Reply::ok(&format!("X {n}"))])).collect();
    assert_eq!(got, expected);
}

/// The old behaviour: two senders at once got each other's replies, and lost commands.
#[test]
fn several_senders_each_get_their_own_reply() {
    let region = region();
    let path = region.host.path();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let senders: Vec<_> = (0..4)
            .map(|sender| {
                scope.spawn(move || {
                    let own = Region::open(path).unwrap();
                    for n in 0..50 {
                        let command = format!("X {sender} {n}");
                        let got = send_command(&own, &command, Duration::from_secs(60));
                        assert_eq!(got, Ok(vec![Reply::ok(&command)]));
                    }
                })
            })
            .collect();
        let host = scope.spawn(|| {
            let (mut mailbox, mut taken) = (HostMailbox::default(), 0);
            while !stop.load(Ordering::Relaxed) {
                let messages = mailbox.take(&region.host, Instant::now()).unwrap();
                taken += messages.len();
                let reply = |message: MailboxMessage| {
                    let text = message.text.clone().unwrap();
                    (message, Reply::ok(&text))
                };
                let answered: Vec<_> = messages.into_iter().map(reply).collect();
                mailbox.reply(&region.host, &answered).unwrap();
                std::thread::sleep(Duration::from_micros(50));
            }
            taken
        });
        for sender in senders {
            sender.join().unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        assert_eq!(host.join().unwrap(), 200, "none is lost, none is taken twice");
    });
}

/// The old behaviour: the command stayed, and was carried out whenever nfqd came.
#[test]
fn a_sender_that_is_interrupted_withdraws_its_command() {
    let region = region();
    let interrupted = AtomicBool::new(false);
    let patience = Patience { timeout: Duration::from_secs(60), interrupted: Some(&interrupted) };
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| send_command(&region, "X 1:2:3:4:5:6", patience));
        while region.load(0) != b'@' {
            std::thread::sleep(Duration::from_millis(1));
        }
        // Another one waits for its turn, not for ever.
        let soon = Duration::from_millis(20);
        assert_eq!(send_command(&region, "Q", soon), Err(SendError::Contended(soon)));
        interrupted.store(true, Ordering::Relaxed);
        assert_eq!(sender.join().unwrap(), Err(SendError::Interrupted));
    });
    assert_eq!(HostMailbox::default().take(&region.host, Instant::now()).unwrap(), []);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn garbage_ends(garbage in proptest::collection::vec(prop_oneof![any::<u8>(), Just(b'@'), Just(b':')], COMMAND_SIZE)) {
        let region = region();
        let mut mailbox = HostMailbox::default();
        region.write(0, &garbage);
        let start = Instant::now();
        // Every scan but the two that wait for a torn message takes at least one mark away.
        for scan in 0..COMMAND_SIZE as u32 {
            let messages = mailbox.take(&region.host, start + UNTERMINATED_AFTER * scan).unwrap();
            prop_assert!(messages.len() <= MAX_MESSAGES);
            answer(&mut mailbox, &region, messages);
        }
        // The next writer finds its place.
        let rest = mailbox.take(&region.host, start + UNTERMINATED_AFTER * COMMAND_SIZE as u32).unwrap();
        prop_assert_eq!(rest, []);
        region.write(0, b"@X 1:2:3:4:5:6@");
        let messages = mailbox.take(&region.host, start).unwrap();
        prop_assert_eq!(messages[0].text.as_deref(), Ok("X 1:2:3:4:5:6"));
    }
}

#[test]
fn the_last_line_tells_how_many_replies_did_not_fit() {
    let region = region();
    let mut mailbox = HostMailbox::default();
    region.write(0, "@Q@".repeat(MAX_MESSAGES).as_bytes());
    let messages = mailbox.take(&region.host, Instant::now()).unwrap();
    let long = Reply::ok(&"x".repeat(700));
    let answered: Vec<_> = messages.into_iter().map(|message| (message, long.clone())).collect();
    mailbox.reply(&region.host, &answered).unwrap();
    let text = reply_text(&region);
    let replies: Vec<Reply> = text.lines().map(|line| line.parse().unwrap()).collect();
    assert!(replies.len() == 4 && replies[0] == long && text.len() < REPLY_SIZE, "{text}");
    assert_eq!(text.lines().last(), Some("ERR internal 13 replies did not fit"));
    assert_eq!(region.load(0), b'$');
}
