//! The view of an operator: the first line of `nfqd status`, `nfqd doctor` and `nfqd trace`, under faults.
#![allow(clippy::unwrap_used)]

use nfqd_tests::daemon::{Daemon, NFQD, Process, program, steer};
use nfqd_tests::frames::{HOSTS, MIDDLEBOXES};
use nfqd_tests::netns::{in_netns, run};
use nfqd_tests::pool::{Fixture, backend_ip, register, to};
use nfqd_tests::tap::Tap;
use nfqd_tests::topology::{CLIENT, Server, VM, VM_MAC, wait_for, who};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Runs nfqd with arguments and the daemon's socket; returns the exit code and the output.
fn nfqd(socket: &Path, arguments: &[&str]) -> (i32, String) {
    let mut command = Command::new(program(NFQD));
    let output = command.args(arguments).arg("--socket").arg(socket).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap() + &String::from_utf8_lossy(&output.stderr);
    (output.status.code().unwrap(), text)
}

/// The first line of the status.
fn first_line(daemon: &Daemon) -> (i32, String) {
    nfqd(&daemon.control(), &["status", "--brief"])
}

/// The findings of the doctor that are no pass, as `GRADE area: check`.
fn findings(socket: &Path) -> Vec<String> {
    let (code, text) = nfqd(socket, &["doctor", "--json"]);
    let all: Value = serde_json::from_str(&text).unwrap();
    let field = |one: &Value, name: &str| one[name].as_str().unwrap_or_default().to_string();
    let all: Vec<String> = all
        .as_array()
        .unwrap()
        .iter()
        .filter(|one| one["grade"] != "PASS")
        .inspect(|one| {
            let is_mended = one["fix"].is_string() || one["grade"] == "WARN";
            assert!(is_mended, "a failure without a command: {one}");
        })
        .map(|one| {
            let (grade, area) = (field(one, "grade"), field(one, "area"));
            format!("{grade} {area}: {}", field(one, "check"))
        })
        .collect();
    let has_failed = all.iter().any(|finding| finding.starts_with("FAIL"));
    assert_eq!(code, i32::from(has_failed), "{text}");
    all
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn faults_are_in_the_first_line_of_the_status_and_found_by_the_doctor() {
    in_netns(|| {
        let fixture = Fixture::new(1);
        let nobody = Path::new("/nowhere/control");
        // Without a daemon, what it would need is examined.
        if steer() != "native" {
            let sysctl = "net.bridge.bridge-nf-call-iptables";
            run(&format!("sysctl -qw {sysctl}=0"));
            let found = findings(nobody);
            assert!(
                found.contains(&"FAIL kernel: path of frames into the queues".to_string()),
                "{found:?}"
            );
            run(&format!("sysctl -qw {sysctl}=1"));
        }
        let queue = nfqd::packet_path::queue::Queue::open(2, true).unwrap();
        let found = findings(nobody);
        assert!(found.contains(&"FAIL queues: queue 2".to_string()), "{found:?}");
        assert!(found.contains(&"FAIL nfqd: running".to_string()), "{found:?}");
        drop(queue);

        let server = Server::start(&fixture.backends[0], "zero", 80);
        let daemon = Daemon::start(&[]);
        register(&daemon, &format!("{VM}:80 rr {}", backend_ip(0)));
        let (code, text) = nfqd(&daemon.control(), &["status", "--wait", "20"]);
        assert_eq!((code, text.lines().next()), (0, Some("OK")), "{text}");
        let (code, text) = nfqd(&daemon.control(), &["status", "--json"]);
        let json: Value = serde_json::from_str(&text).unwrap();
        assert_eq!((code, &json["problems"]), (0, &Value::Array(vec![])), "{text}");
        let healthy = findings(&daemon.control());
        assert!(healthy.iter().all(|finding| finding.starts_with("WARN")), "{healthy:?}");

        // A backend that is dead.
        run("ip link set b0 down");
        wait_for("death", || first_line(&daemon).1.contains("NO BACKEND"));
        assert_eq!(first_line(&daemon).0, 1);
        let found = findings(&daemon.control());
        for problem in ["NO BACKEND", "DEAD"] {
            assert!(found.contains(&format!("FAIL nfqd: {problem}")), "{found:?}");
        }
        run("ip link set b0 up");
        let start = Instant::now();
        let (code, _) = nfqd(&daemon.control(), &["status", "--brief", "--wait", "30"]);
        assert_eq!(code, 0, "{}", daemon.log());
        assert!(start.elapsed() < Duration::from_secs(30), "as soon as it is well");

        // A region that is cut.
        std::fs::write(daemon.region(), [0; 10]).unwrap();
        wait_for("the region", || first_line(&daemon).1.starts_with("NOT READ: "));
        let found = findings(&daemon.control());
        assert!(found.contains(&"FAIL nfqd: NOT READ".to_string()), "{found:?}");
        // A chain of a firewall that drops what it does not know.
        if steer() != "native" {
            run("nft add table ip f");
            run(
                "nft add chain ip f forward { type filter hook forward priority 0 ; policy drop ; }",
            );
            let found = findings(&daemon.control());
            let named = "FAIL other firewalls: ip f forward (forward)".to_string();
            assert!(found.contains(&named), "{found:?}");
        }
        drop(server);
        let (code, text) = nfqd(nobody, &["status"]);
        assert_eq!(code, 3);
        assert!(text.contains("is nfqd running"), "{text}");
    });
}

/// A trace tells what then really happens, and has no effect: neither on flows nor on turns.
#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn a_trace_tells_what_then_happens_and_changes_nothing() {
    in_netns(|| {
        let fixture = Fixture::new(2);
        let _servers = [
            Server::start(&fixture.backends[0], "zero", 80),
            Server::start(&fixture.backends[1], "one", 80),
        ];
        let daemon = Daemon::start(&[]);
        daemon.must(&format!("R F {VM_MAC} {VM}"));
        daemon.must(&format!("A {VM_MAC} #7 T 2 d 23"));
        register(&daemon, &format!("{VM}:80 rr {} {}", to(0), to(1)));
        let trace = |packet: &str| {
            let (code, text) = nfqd(&daemon.control(), &["trace", packet, "--json"]);
            assert_eq!(code, 0, "{text}");
            serde_json::from_str::<Value>(&text).unwrap()
        };
        let syn = |port: u16| format!("tcp {CLIENT}:40000 > {VM}:{port} syn to {VM_MAC}");
        for _ in 0..6 {
            let told = trace(&syn(80));
            assert_eq!(told["verdict"], "redirect", "{told}");
            for _ in 0..3 {
                assert_eq!(trace(&syn(80)), told, "a trace takes no turn");
            }
            let ip = told["to"]["ip"].as_str().unwrap().to_string();
            let expected = if ip == backend_ip(0).to_string() { "zero" } else { "one" };
            assert_eq!(who(&fixture.client, VM, 80).as_deref(), Some(expected), "{told}");
        }
        let told = trace(&syn(23));
        assert_eq!((&told["verdict"], &told["reason"]), (&"drop".into(), &"deny-rule".into()));
        assert_eq!(told["rule"], "#7", "{told}");
        assert_eq!(trace(&syn(22))["reason"], "no-match");
        let (code, text) = nfqd(&daemon.control(), &["trace", &syn(23)]);
        assert_eq!((code, text.lines().last()), (0, Some("drop: deny rule 7 matches")), "{text}");
        assert!(
            text.contains("#7 matches: protocol tcp is tcp, destination port 23 is 23"),
            "{text}"
        );
        let (code, text) = nfqd(&daemon.control(), &["trace", "tcp nonsense"]);
        assert_eq!(code, 1);
        assert!(text.contains("'nonsense': not an address"), "{text}");
    });
}

/// Decisions are recorded while somebody observes.
#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn decisions_are_observed_and_a_report_is_written() {
    in_netns(|| {
        let fixture = Fixture::new(1);
        let _server = Server::start(&fixture.backends[0], "zero", 80);
        let daemon = Daemon::start(&["--fast-path", "off"]);
        daemon.must(&format!("R F {VM_MAC} {VM}"));
        daemon.must(&format!("A {VM_MAC} #7 T 2 d 23"));
        register(&daemon, &format!("{VM}:80 rr {}", to(0)));
        assert_eq!(who(&fixture.client, VM, 80).as_deref(), Some("zero"), "nobody observes yet");
        let observe = |arguments: &[&str]| {
            let arguments = [&["observe", "--json", "--last", "500"], arguments].concat();
            let (code, text) = nfqd(&daemon.control(), &arguments);
            assert_eq!(code, 0, "{text}");
            text.lines()
                .map(|line| serde_json::from_str::<Value>(line).unwrap())
                .collect::<Vec<_>>()
        };
        assert_eq!(observe(&[]).len(), 0);
        assert_eq!(who(&fixture.client, VM, 80).as_deref(), Some("zero"));
        assert_eq!(who(&fixture.client, VM, 23), None);
        let redirected = observe(&["--verdict", "redirect", "--ip", &CLIENT.to_string()]);
        assert!(redirected.len() >= 3, "{redirected:?}");
        assert!(
            redirected.iter().all(|one| one["backend"] == "10.129.126.100:80"),
            "{redirected:?}"
        );
        let dropped = observe(&["--reason", "deny-rule"]);
        assert!(
            !dropped.is_empty() && dropped.iter().all(|one| one["rule"] == "#7"),
            "{dropped:?}"
        );
        let other = observe(&["--not", "--rule", "#7"]);
        assert!(other.iter().all(|one| one["rule"].is_null()), "{other:?}");
        // A packet as it is shown can be traced.
        let packet = dropped[0]["packet"].as_str().unwrap();
        let (code, text) = nfqd(&daemon.control(), &["trace", packet]);
        assert!(code == 0 && text.ends_with("drop: deny rule 7 matches\n"), "{text}");
        let folder = tempfile::tempdir().unwrap();
        let archive = folder.path().join("report.tar");
        let (code, text) = nfqd(&daemon.control(), &["report", archive.to_str().unwrap()]);
        assert_eq!(code, 0, "{text}");
        let list = run(&format!("tar -tf {}", archive.display()));
        for name in ["status.json", "doctor.txt", "ruleset.txt"] {
            assert!(list.contains(&format!("nfqd-report/{name}")), "{list}");
        }
        let (code, text) = nfqd(&daemon.control(), &["report", archive.to_str().unwrap()]);
        assert!(code == 3 && text.contains("exists"), "{text}");
    });
}

/// A channel comes and goes with its VM, and outlives the daemon.
#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn channels_are_attached_and_detached_while_nfqd_runs() {
    in_netns(|| {
        let mut daemon = Daemon::start(&[]);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vm1");
        let name = path.display().to_string();
        let change = |daemon: &Daemon, arguments: &[&str]| {
            let mut command = Command::new(program(NFQD));
            let output =
                command.args(arguments).arg("--control").arg(daemon.control()).output().unwrap();
            (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned())
        };
        let spec = format!("{name},mac={VM_MAC}");
        assert_eq!(change(&daemon, &["attach", &spec]), (0, String::new()));
        assert_eq!(change(&daemon, &["attach", &spec]).0, 0, "again");
        let (code, text) = change(&daemon, &["attach", &name]);
        assert!(code == 1 && text.contains("with other keys"), "{text}");
        let tell = |command: &str| {
            let region = nfqd_shmctl::Region::open(&path).unwrap();
            let timeout = Duration::from_secs(10);
            nfqd_shmctl::mailbox::guest::send_command(&region, command, timeout).unwrap().remove(0)
        };
        assert!(tell(&format!("R F {VM_MAC} {VM}")).is_ok());
        assert!(!tell("R F 2:0:0:0:0:1 10.0.0.1").is_ok(), "it is bound");
        daemon.signal(nix::sys::signal::Signal::SIGHUP);
        assert!(tell("Q").is_ok(), "after the configuration was read again");
        daemon.kill();
        daemon.restart();
        assert!(tell("Q").is_ok(), "after a restart");
        assert_eq!(daemon.status().channels.len(), 2);
        assert_eq!(change(&daemon, &["detach", &name]).0, 0);
        assert_eq!(daemon.status().channels.len(), 1);
        let (code, text) = change(&daemon, &["detach", &name]);
        assert!(code == 1 && text.contains("not an attached channel"), "{text}");
        // libvirt's hook prints nothing and does not fail, whatever it is given.
        for (arguments, xml) in
            [(["fw1", "prepare", "begin", "-"], "<domain"), (["fw1", "other", "-", "-"], "")]
        {
            let mut command = Command::new(program(NFQD));
            command.args(["hook", "libvirt", "--control", "/nowhere"]).args(arguments);
            command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
            let mut child = command.stderr(std::process::Stdio::piped()).spawn().unwrap();
            use std::io::Write;
            child.stdin.take().unwrap().write_all(xml.as_bytes()).unwrap();
            let output = child.wait_with_output().unwrap();
            assert!(
                output.status.success() && output.stdout.is_empty() && output.stderr.is_empty()
            );
        }
        let domain = format!(
            "<domain><devices><interface type='bridge'><mac address='{VM_MAC}'/><source bridge='br0'/></interface>\
             <shmem name='nfqd-test-{}'><model type='ivshmem-plain'/></shmem></devices></domain>",
            std::process::id()
        );
        let hook = |operation: &str| {
            nfqd::hook::libvirt::run(&daemon.control(), "fw1", operation, &domain);
        };
        hook("prepare");
        let channels = daemon.status().channels;
        let channel =
            channels.iter().find(|one| one.path.starts_with("/dev/shm/nfqd-test-")).unwrap();
        assert_eq!(channel.macs, [VM_MAC]);
        hook("release");
        assert_eq!(daemon.status().channels.len(), 1);
        std::fs::remove_file(&channel.path).unwrap();
        // Proxmox' hookscript: QEMU has made the memory.
        let output =
            Command::new(program(NFQD)).args(["hook", "proxmox", "101", "post-start"]).output();
        let output = output.unwrap();
        assert!(output.status.success() && output.stdout.is_empty() && output.stderr.is_empty());
        let name = format!("nfqd-test-{}", std::process::id());
        let memory = format!("/dev/shm/pve-shm-{name}");
        std::fs::write(&memory, vec![0; 1 << 20]).unwrap();
        let vm = format!("ivshmem: size=1,name={name}\nnet0: virtio={VM_MAC},bridge=br0\n");
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("101.conf"), vm).unwrap();
        let hook = |phase: &str| {
            nfqd::hook::proxmox::run_in(folder.path(), &daemon.control(), "101", phase);
        };
        hook("pre-start");
        assert_eq!(daemon.status().channels.len(), 1);
        hook("post-start");
        let channels = daemon.status().channels;
        let channel = channels.iter().find(|one| one.path == memory).unwrap();
        assert_eq!(channel.macs, [VM_MAC]);
        let region = nfqd_shmctl::Region::open(Path::new(&memory)).unwrap();
        assert!(nfqd_shmctl::ring::guest::is_there(&region));
        hook("post-stop");
        assert_eq!(daemon.status().channels.len(), 1);
        assert!(!nfqd_shmctl::ring::guest::is_there(&region), "its guest sees that nobody reads");
        std::fs::remove_file(&memory).unwrap();
    });
}

/// The answer of `nfqd serve`, by its head and its body.
fn get(listen: &str, path: &str) -> (String, String) {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(listen).unwrap();
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: {listen}\r\n\r\n").as_bytes()).unwrap();
    let mut out = String::new();
    stream.read_to_string(&mut out).unwrap();
    let (head, body) = out.split_once("\r\n\r\n").unwrap();
    (head.to_string(), body.to_string())
}

/// The page, the metrics and the JSON show the same, and change with the daemon.
#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn metrics_and_the_page_follow_the_daemon() {
    in_netns(|| {
        let fixture = Fixture::new(1);
        let _server = Server::start(&fixture.backends[0], "zero", 80);
        // Many middleboxes: a page and a scrape that are complete and not slow.
        let folder = tempfile::tempdir().unwrap();
        let commands = folder.path().join("commands");
        let line = |n: u32| {
            let [.., a, b] = n.to_be_bytes();
            format!("R F 2:1:0:0:{a:x}:{b:x} 10.9.{a}.{b}\n")
        };
        std::fs::write(&commands, (0..1000).map(line).collect::<String>()).unwrap();
        let mut daemon = Daemon::start(&["--commands", commands.to_str().unwrap()]);
        register(&daemon, &format!("{VM}:80 rr {}", backend_ip(0)));
        daemon.must(&format!("R F {VM_MAC} {VM}"));
        daemon.must(&format!("A {VM_MAC} #7 T 2 d 23"));
        let listen = "127.0.0.1:9477";
        let mut command = Command::new(program(NFQD));
        let child = command.args(["serve", "--socket"]).arg(daemon.control()).spawn().unwrap();
        let _serve = Process(child);
        wait_for("the page", || std::net::TcpStream::connect(listen).is_ok());
        let backend = format!(
            "network=\"br0\",middlebox=\"{VM_MAC}\",vip=\"{VM}:80\",backend=\"{}:80\"",
            backend_ip(0)
        );
        let shows = |path: &str, text: &str| get(listen, path).1.contains(text);
        let up = |value: u8| format!("nfqd_backend_up{{{backend}}} {value}\n");
        wait_for("the backend", || shows("/metrics", &up(1)));
        assert!(shows("/", "<td>10.129.126.100:80</td>"), "{:?}", get(listen, "/"));
        assert!(!shows("/metrics", "nfqd_rule_packets_total"));
        assert!(shows(
            "/metrics?scope=rules",
            &format!(
                "nfqd_rule_packets_total{{network=\"br0\",middlebox=\"{VM_MAC}\",rule=\"#7\"}} 0"
            )
        ));
        let (head, body) = get(listen, "/api/status");
        let json: Value = serde_json::from_str(&body).unwrap();
        let all = json["middleboxes"].as_array().unwrap();
        assert!(head.contains("application/json") && all.iter().any(|one| one["mac"] == VM_MAC));
        run("ip link set b0 down");
        wait_for("death", || shows("/metrics", &up(0)));
        let series = get(listen, "/metrics").1.matches("nfqd_middlebox_packets_total{").count();
        assert_eq!(series, 1001);
        let start = Instant::now();
        let rows = get(listen, "/").1.matches("<tr").count();
        assert!(
            rows > 1000 && start.elapsed() < Duration::from_secs(2),
            "{rows} in {:?}",
            start.elapsed()
        );
        daemon.kill();
        wait_for("that it is gone", || shows("/metrics", "nfqd_up 0") && shows("/", "NOT RUNNING"));
        daemon.restart();
        wait_for("that it is back", || shows("/metrics", "nfqd_up 1"));
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn top_is_a_screen_on_a_terminal() {
    in_netns(|| {
        run("ip link add br0 type bridge");
        let daemon = Daemon::start(&[]);
        daemon.must("R F 2:0:0:0:0:7 10.0.0.7");
        let top = |keys: &str, arguments: &str| {
            let (nfqd, socket) = (program(NFQD), daemon.control());
            let line = format!(
                "stty rows 24 cols 120; exec {} top {arguments} --socket {}",
                nfqd.display(),
                socket.display()
            );
            // script(1) makes a terminal.
            let typed = format!(
                "(sleep 1.5; printf '{keys}'; sleep 1) | TERM=xterm script -qec '{line}' /dev/null"
            );
            let output = Command::new("sh").args(["-c", &typed]).output().unwrap();
            (output.status.code(), String::from_utf8_lossy(&output.stdout).to_string())
        };
        let (code, text) = top("\\tq", "");
        assert_eq!(code, Some(0), "{text}");
        assert!(text.contains("02:00:00:00:00:07") && text.contains("middlebox: 1 rows"), "{text}");
        // The terminal is as it was: the alternate screen is left, and the cursor shown.
        assert!(text.contains("\u{1b}[?1049h") && text.contains("\u{1b}[?1049l"), "{text}");
        assert!(text.rfind("\u{1b}[?25h") > text.rfind("\u{1b}[?25l"), "{text}");
        // By Ctrl-C as well.
        assert_eq!(top("\\003", "").0, Some(0));
        let (code, text) = top("", "--once");
        assert!(code == Some(0) && !text.contains('\u{1b}'), "{text}");
    });
}

/// Counters of so many middleboxes are read by a thread, while rules are made anew.
#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn counters_of_many_middleboxes_never_fall_while_rules_change() {
    in_netns(|| {
        let macs = (0..2000).map(|n| format!("02:01:00:00:{:02x}:{:02x}", n / 256, n % 256));
        let rules = |mac: &String| {
            format!(
                "R F {mac} 10.0.0.1\nA {mac} #1 U 2 d 5-9\nA {mac} #2 U 2 d 8-10\nA {mac} #3 U 2 d 6-12\n"
            )
        };
        let [one, two] = MIDDLEBOXES;
        let all: String =
            macs.chain([one.to_string(), two.to_string()]).map(|mac| rules(&mac)).collect();
        run("ip link add br0 type bridge mcast_snooping 0");
        run("ip link set br0 up");
        let uplink = Tap::on_bridge("br0", "uplink", &[]);
        let _vm = Tap::on_bridge("br0", "vm", &MIDDLEBOXES);
        let directory = tempfile::tempdir().unwrap();
        let commands = directory.path().join("commands");
        std::fs::write(&commands, all).unwrap();
        let daemon = Daemon::start(&["--commands", commands.to_str().unwrap()]);
        let mac = |text: &str| text.parse::<nfqd_shmctl::MacAddr>().unwrap().0;
        let frame = |to: &str, port: u16| {
            let mut out = Vec::new();
            etherparse::PacketBuilder::ethernet2(mac(HOSTS[0]), mac(to))
                .ipv4([10, 0, 0, 4], [10, 0, 0, 2], 64)
                .udp(4000, port)
                .write(&mut out, b"x")
                .unwrap();
            out
        };
        let counted = || {
            let status = daemon.status();
            let of = |mac: &str| {
                let its = status.middleboxes.iter().find(|its| its.mac == mac).unwrap();
                let rules = its.rules.iter().map(|rule| (rule.rule.clone(), rule.packets));
                rules.collect::<BTreeMap<_, _>>()
            };
            MIDDLEBOXES.map(of)
        };
        let (mut sent, is_over) = (0, AtomicBool::new(false));
        std::thread::scope(|scope| {
            let observer = scope.spawn(|| {
                let mut before = counted();
                while !is_over.load(Relaxed) {
                    let now = counted();
                    for (now, before) in now.iter().zip(&before) {
                        for (rule, packets) in before {
                            assert!(now[rule] >= *packets, "{rule} fell from {packets}: {now:?}");
                        }
                    }
                    before = now;
                }
            });
            let end = Instant::now() + Duration::from_secs(4);
            while Instant::now() < end && !observer.is_finished() {
                for to in MIDDLEBOXES {
                    uplink.send(&frame(to, 12));
                }
                sent += 1;
                // Overlapping ranges share a chain, which is made anew.
                daemon.must(&format!("A {one} #2 U 2 d 8-{}", 10 + sent % 2));
            }
            is_over.store(true, Relaxed);
        });
        wait_for("all of them", || counted().iter().all(|its| its["#3"] >= sent));
        assert!(counted().iter().all(|its| its["#3"] == sent), "{sent}: {:?}", counted());
    });
}
