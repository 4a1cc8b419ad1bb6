//! Real hosts on a bridge: the behaviour when nfqd starts, dies or exits, its configuration is
//! read again, another program interferes, or the disk is full.
#![allow(clippy::unwrap_used)]

use nfqd::api::{BackendState, Status};
use nfqd_tests::daemon::{Daemon, NFQD, program};
use nfqd_tests::fixture::{Fixture, STATIC};
use nfqd_tests::netns::{in_netns, run};
use nfqd_tests::topology::{BACKEND, Server, Topology, VM, connect, pings, wait_for, who};
use std::cell::RefCell;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::time::{Duration, Instant};

/// The handles of the base chains, which change if one is made anew.
fn base_chains() -> Vec<String> {
    let text = run("nft -a list table bridge nfqd");
    let chains: Vec<String> = text
        .lines()
        .filter(|l| {
            ["steer", "learn", "learn_early"]
                .iter()
                .any(|name| l.contains(&format!("chain {name} {{")))
        })
        .map(str::to_string)
        .collect();
    assert_eq!(chains.len(), 2, "{text}");
    chains
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn killed_in_the_middle_of_traffic() {
    in_netns(|| {
        let mut fixture = Fixture::new(&[]);
        fixture.redirect();
        fixture.daemon.must("R F 12:13:14:15:16:17 10.129.126.15");
        fixture.daemon.must("A 12:13:14:15:16:17 T 2 d 81");
        let before = fixture.daemon.status();
        let chains = base_chains();
        let mut connection = connect(&fixture.topology.client, VM, 80).unwrap();
        let chunk = vec![7; 1 << 20];
        connection.send(&chunk);

        fixture.daemon.kill();
        (0..20).for_each(|_| connection.send(&chunk));
        assert_eq!(
            fixture.at_vm().as_deref(),
            Some("backend"),
            "a static redirect needs no engine"
        );
        assert_eq!(who(&fixture.topology.client, VM, 81), None, "nor does a filter");

        fixture.daemon.restart();
        (0..20).for_each(|_| connection.send(&chunk));
        assert!(
            connection.finish().starts_with(&format!("{} ", 41 << 20)),
            "the connection outlived it all"
        );
        assert_eq!(base_chains(), chains, "no base chain was made anew");
        let after = fixture.daemon.status();
        let registered = |status: &Status| {
            status.middleboxes.iter().map(|m| m.commands.clone()).collect::<Vec<_>>()
        };
        assert_eq!(registered(&after), registered(&before), "nothing is registered twice or lost");
        assert_eq!(fixture.at_vm().as_deref(), Some("backend"));
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn a_regular_exit_keeps_the_rules_and_flush_removes_them() {
    in_netns(|| {
        let mut fixture = Fixture::new(&[]);
        fixture.redirect();
        assert!(fixture.daemon.terminate().success());
        assert_eq!(fixture.at_vm().as_deref(), Some("backend"));
        let flush = Command::new(program(NFQD)).arg("flush").output().unwrap();
        assert!(flush.status.success());
        assert!(!run("nft list tables").contains("nfqd"));
        assert_eq!(fixture.at_vm().as_deref(), Some("vm"));
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn fail_closed_drops_packets_without_a_daemon() {
    in_netns(|| {
        let mut fixture = Fixture::new(&["--fail", "closed"]);
        fixture.redirect();
        assert_eq!(fixture.at_vm().as_deref(), Some("backend"));
        fixture.daemon.kill();
        assert_eq!(fixture.at_vm(), None);
        fixture.daemon.restart();
        assert_eq!(fixture.at_vm().as_deref(), Some("backend"));
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn a_pools_connection_outlives_an_absence_that_the_kernels_cache_does_not() {
    in_netns(|| {
        let mut fixture = Fixture::new(&[]);
        fixture.daemon.must("R L 12:13:14:15:16:17 10.129.126.15:80 rr 10.129.126.17");
        wait_for("the backend's MAC", || {
            fixture.daemon.status().middleboxes[0].services[0].backends[0].mac.is_some()
        });
        let mut connection = connect(&fixture.topology.client, VM, 80).unwrap();
        let chunk = vec![7; 1 << 10];
        connection.send(&chunk);
        fixture.daemon.kill();
        for map in ["flows_tcp4", "flows_port_tcp4"] {
            run(&format!("nft flush map bridge nfqd br0/{map}"));
        }
        connection.send(&chunk);
        std::thread::sleep(Duration::from_millis(500));
        fixture.daemon.restart();
        connection.send(&chunk);
        assert!(connection.finish().starts_with(&format!("{} ", 3 << 10)), "it was not reset");
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn what_only_the_engine_filters_stays_denied_without_it() {
    in_netns(|| {
        let mut fixture = Fixture::new(&["--fail", "closed", "--fast-path", "off"]);
        fixture.daemon.must("R F 12:13:14:15:16:17 10.129.126.15 deny");
        fixture.daemon.must("A 12:13:14:15:16:17 +1 M 4 p arp");
        let client = &fixture.topology.client;
        assert!(!pings(client, VM) && who(client, VM, 80).is_none());
        fixture.daemon.kill();
        assert!(!pings(client, VM) && who(client, VM, 80).is_none());
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn fail_closed_is_as_narrow_as_the_services() {
    in_netns(|| {
        let mut fixture = Fixture::new(&["--fail", "closed"]);
        fixture.daemon.must("R L 12:13:14:15:16:17 10.129.126.15 rr 10.129.126.17");
        wait_for("the backend's MAC", || {
            fixture.daemon.status().middleboxes[0].services[0].backends[0].mac.is_some()
        });
        let Topology { client, other, backend, vm } = &fixture.topology;
        let _other = Server::start(other, "other", 80);
        assert_eq!(who(client, VM, 80).as_deref(), Some("backend"));
        fixture.daemon.kill();
        assert_eq!(who(client, VM, 80), None, "the service waits");
        let at = |number: u8| std::net::Ipv4Addr::new(10, 129, 126, number);
        assert_eq!(who(backend, at(2), 80).as_deref(), Some("other"), "the backend as a client");
        assert_eq!(who(other, BACKEND, 80).as_deref(), Some("backend"), "and as a server");
        assert!(pings(backend, at(2)) && pings(other, BACKEND), "pings of the backend");
        assert!(pings(client, VM), "the middlebox");
        assert_eq!(who(backend, VM, 80), None, "the backend as a client of the service");
        let vm = vm.as_ref().unwrap();
        assert_eq!(who(vm, at(2), 80).as_deref(), Some("other"), "what the middlebox begins");
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn a_connection_that_opens_outlives_the_daemon() {
    for fail in ["open", "closed"] {
        in_netns(move || {
            let mut fixture = Fixture::new(&["--fail", fail]);
            fixture.daemon.must("R L 12:13:14:15:16:17 10.129.126.15:80 rr 10.129.126.17");
            wait_for("the backend's MAC", || {
                fixture.daemon.status().middleboxes[0].services[0].backends[0].mac.is_some()
            });
            // The backend's answers wait until nfqd is away.
            let script = tempfile::NamedTempFile::new().unwrap();
            let hold =
                "table bridge hold {\n chain input {\n type filter hook prerouting priority -310\n
                        iifname backend tcp flags syn,ack / syn,ack drop\n }\n}\n
                 table bridge watch {\n chain out {\n type filter hook postrouting priority 250\n
                        oifname client ip saddr 10.129.126.17 counter\n }\n}\n";
            std::fs::write(script.path(), hold).unwrap();
            run(&format!("nft -f {}", script.path().display()));
            let (client, daemon) = (&fixture.topology.client, &mut fixture.daemon);
            std::thread::scope(|scope| {
                let connecting = scope.spawn(|| {
                    let address = std::net::SocketAddr::from((VM, 80));
                    let connect = std::net::TcpStream::connect_timeout;
                    let mut stream =
                        client.enter(|| connect(&address, Duration::from_secs(15))).unwrap();
                    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
                    let mut greeting = [0; 8];
                    stream.read_exact(&mut greeting).unwrap();
                    greeting
                });
                wait_for("the SYN", || {
                    daemon.status().queues.iter().any(|queue| queue.redirected != 0)
                });
                daemon.kill();
                run("nft delete table bridge hold");
                // After a second the client sends its SYN again, and the backend its answer.
                std::thread::sleep(Duration::from_millis(2500));
                daemon.restart();
                assert_eq!(&connecting.join().unwrap(), b"backend\n", "{fail}");
            });
            // The backend's answers come from the service's address, or not at all.
            let seen = run("nft list table bridge watch");
            assert!(seen.contains("counter packets 0 "), "{fail}: {seen}");
        });
    }
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn br_netfilter_is_switched_off() {
    in_netns(|| {
        let fixture = Fixture::new(&["--fail", "closed"]);
        fixture.daemon.must("R L 12:13:14:15:16:17 10.129.126.15:80 rr 10.129.126.17");
        wait_for("the backend's MAC", || {
            fixture.daemon.status().middleboxes[0].services[0].backends[0].mac.is_some()
        });
        assert_eq!(fixture.at_vm().as_deref(), Some("backend"));
        let sysctl = "/proc/sys/net/bridge/bridge-nf-call-iptables";
        let by_br_netfilter = fixture.daemon.status().steer == "br-netfilter";
        for _ in 0..3 {
            std::fs::write(sysctl, "0").unwrap();
            let answers = RefCell::new(Vec::new());
            wait_for("the switch", || {
                answers.borrow_mut().push(fixture.at_vm());
                !by_br_netfilter || std::fs::read_to_string(sysctl).unwrap().trim() == "1"
            });
            let answers = answers.into_inner();
            assert!(!answers.contains(&Some("vm".to_string())), "closed is closed: {answers:?}");
            assert_eq!(fixture.at_vm().as_deref(), Some("backend"));
        }
        assert_eq!(fixture.daemon.status().steering_error, None);
        assert_eq!(
            fixture.daemon.log().contains("changed net.bridge.bridge-nf-call-iptables"),
            by_br_netfilter
        );
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn another_program_changes_our_tables() {
    in_netns(|| {
        let fixture = Fixture::unprotected();
        fixture.redirect();
        let handle =
            |text: &str| text.lines().find(|line| line.contains("chain steer")).map(str::to_string);
        for (number, interference) in [
            "nft flush chain bridge nfqd steer",
            "nft flush map bridge nfqd br0/middleboxes",
            "nft add rule bridge nfqd br0/balanced drop",
        ]
        .into_iter()
        .enumerate()
        {
            let chains = run("nft -a list table bridge nfqd");
            run(interference);
            wait_for(interference, || fixture.daemon.status().repairs == number as u64 + 1);
            assert_eq!(fixture.at_vm().as_deref(), Some("backend"), "{interference}");
            assert_eq!(
                handle(&run("nft -a list table bridge nfqd")),
                handle(&chains),
                "base chains stand"
            );
        }
        // Two programs that fight do it slowly.
        let start = Instant::now();
        let before = fixture.daemon.status().repairs;
        while start.elapsed() < Duration::from_secs(3) {
            run("nft flush chain bridge nfqd steer");
        }
        let fought = fixture.daemon.status().repairs - before;
        assert!((2..20).contains(&fought), "{fought} repairs");
        // Our own changes and other tables are no interference.
        std::thread::sleep(Duration::from_millis(2500));
        let repairs = fixture.daemon.status().repairs;
        fixture.daemon.must("R F 12:13:14:15:16:17 10.129.126.15");
        run("nft add table bridge other");
        std::thread::sleep(Duration::from_millis(1500));
        assert_eq!(fixture.daemon.status().repairs, repairs);
        run("nft delete table bridge nfqd");
        wait_for("the repair", || fixture.daemon.status().repairs == repairs + 1);
        assert_eq!(fixture.at_vm().as_deref(), Some("backend"));
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn a_flush_of_the_ruleset_resets_no_connection() {
    in_netns(|| {
        let mut fixture = Fixture::new(&[]);
        fixture.redirect();
        fixture.daemon.must("R F 12:13:14:15:16:17 10.129.126.15");
        fixture.daemon.must("A 12:13:14:15:16:17 T 2 d 81");
        // Since Linux 6.9.
        let is_protected = run("nft list table bridge nfqd").contains("\tflags owner");
        if is_protected {
            let mut connection = connect(&fixture.topology.client, VM, 80).unwrap();
            let chunk = vec![7; 1 << 16];
            for _ in 0..5 {
                run("nft flush ruleset");
                assert_eq!(who(&fixture.topology.client, VM, 81), None, "denied stays denied");
                connection.send(&chunk);
            }
            let answer = connection.finish();
            assert!(answer.starts_with(&format!("{} ", 5 << 16)), "it was not reset: {answer}");
            assert_eq!(fixture.daemon.status().repairs, 0, "there was nothing to repair");
            let delete = "nft delete table bridge nfqd".split(' ').collect::<Vec<_>>();
            let output = Command::new(delete[0]).args(&delete[1..]).output().unwrap();
            assert!(!output.status.success(), "nobody else may");
        } else {
            // Earlier kernels: what passes in between goes to the middlebox.
            run("nft flush ruleset");
            wait_for("the repair", || fixture.daemon.status().repairs == 1);
            assert_eq!(who(&fixture.topology.client, VM, 81), None);
        }
        let flush = || Command::new(program(NFQD)).arg("flush").output().unwrap();
        let refused = String::from_utf8(flush().stderr).unwrap();
        assert!(refused.contains(&format!("pid {}", fixture.daemon.pid())), "{refused}");
        // The next nfqd takes the table over.
        fixture.daemon.kill();
        fixture.daemon.restart();
        fixture.daemon.must("A 12:13:14:15:16:17 T 2 d 82");
        assert_eq!(fixture.at_vm().as_deref(), Some("backend"));
        assert!(fixture.daemon.terminate().success());
        assert!(flush().status.success());
        assert!(!run("nft list tables").contains("nfqd"));
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn a_second_nfqd_is_refused_without_a_trace() {
    in_netns(|| {
        let fixture = Fixture::new(&[]);
        fixture.redirect();
        // The handles change if one is made anew.
        let chains = || {
            let text = run("nft -a list ruleset");
            let is_chain = |line: &&str| line.contains("chain ");
            text.lines().filter(is_chain).map(str::to_string).collect::<Vec<_>>()
        };
        let before = chains();
        let state = tempfile::tempdir().unwrap();
        for queues in ["0-3", "8-9"] {
            let output = Command::new(program(NFQD))
                .args(["--queue", queues, "--state"])
                .arg(state.path().join("state"))
                .arg("--control")
                .arg(state.path().join("control"))
                .output()
                .unwrap();
            let message = String::from_utf8(output.stderr).unwrap();
            assert_eq!(output.status.code(), Some(3), "{message}");
            assert!(message.contains(&format!("pid {}", fixture.daemon.pid())), "{message}");
        }
        std::thread::sleep(Duration::from_millis(1500));
        assert_eq!(fixture.daemon.status().repairs, 0);
        assert_eq!(chains(), before);
        assert_eq!(std::fs::read_dir(state.path()).unwrap().count(), 0);
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn a_region_is_cut_and_made_anew_while_commands_come() {
    in_netns(|| {
        let fixture = Fixture::new(&[]);
        let path = fixture.daemon.region();
        for round in 0..100_u64 {
            let file = std::fs::File::options().write(true).open(&path).unwrap();
            file.write_all_at(b"@Q@", 0).unwrap();
            std::thread::sleep(Duration::from_micros(round * 40));
            file.set_len(0).unwrap();
            file.set_len(1 << 20).unwrap();
        }
        fixture.daemon.status();
        for command in ["R F 2:0:0:0:0:1 10.0.0.1", "X 2:0:0:0:0:1"] {
            // A VM's stop and start.
            std::fs::remove_file(&path).unwrap();
            wait_for("the notice", || fixture.daemon.status().channels[0].error.is_some());
            std::fs::write(&path, vec![0; 1 << 20]).unwrap();
            wait_for("the new one", || fixture.daemon.status().channels[0].error.is_none());
            fixture.daemon.must(command);
        }
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn a_state_directory_that_vanishes_is_in_the_status() {
    in_netns(|| {
        let fixture = Fixture::new(&[]);
        let state = std::path::PathBuf::from(fixture.daemon.status().state);
        let (directory, away) = (state.parent().unwrap(), state.with_file_name("away"));
        let away = directory.with_file_name(away.file_name().unwrap());
        std::fs::rename(directory, &away).unwrap();
        wait_for("the notice", || fixture.daemon.status().state_error.is_some());
        fixture.daemon.must("R F 2:0:0:0:0:1 10.0.0.1");
        std::fs::create_dir(directory).unwrap();
        wait_for("the end of it", || fixture.daemon.status().state_error.is_none());
        assert!(std::fs::read_to_string(&state).unwrap().contains("R F 02:00:00:00:00:01"));
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn a_connection_that_has_ended_is_not_taken_over() {
    in_netns(|| {
        let mut fixture = Fixture::new(&[]);
        fixture.daemon.must("R L 12:13:14:15:16:17 10.129.126.15:80 rr 10.129.126.17");
        let backend =
            |daemon: &Daemon| daemon.status().middleboxes[0].services[0].backends[0].clone();
        wait_for("the backend's MAC", || backend(&fixture.daemon).mac.is_some());
        assert_eq!(fixture.at_vm().as_deref(), Some("backend"));
        wait_for("its end", || backend(&fixture.daemon).flows == 0);
        // The kernel forgets the close after five seconds, and an opening after 63.
        std::thread::sleep(Duration::from_secs(6));
        fixture.daemon.kill();
        fixture.daemon.restart();
        assert_eq!(backend(&fixture.daemon).flows, 0);
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn a_restart_takes_over_what_the_kernel_remembers() {
    in_netns(|| {
        let mut fixture = Fixture::new(&[]);
        fixture.redirect();
        assert_eq!(fixture.at_vm().as_deref(), Some("backend"));
        let index = || run("nft list map bridge nfqd backend_vip4");
        // Another version, then the first again: its number is new, and a restart does not reuse
        // the old ones.
        fixture.daemon.must("R L 12:13:14:15:16:17 10.129.126.15 1 10.129.126.1 10.129.126.17");
        fixture.daemon.must(STATIC);
        // The old ones stay for some seconds, for replies on their way.
        let before = index();
        assert!(before.contains("0x00000300") && before.contains("0x00000100"), "{before}");
        let mut connection = connect(&fixture.topology.client, VM, 80).unwrap();
        connection.send(b"x");
        fixture.daemon.kill();
        // The backend's MAC is known from the kernel's map until it answers again.
        fixture.daemon.restart();
        let restarted = index();
        assert!(restarted.contains("0x00000300"), "{restarted}");
        assert!(!restarted.contains("0x00000100"), "{restarted}");
        assert_eq!(
            fixture.daemon.status().middleboxes[0].services[0].backends[0].mac.as_deref(),
            Some("02:00:00:00:00:17")
        );
        assert!(fixture.daemon.status().flows.count >= 1, "the ways back are known again");
        fixture.daemon.must("R L 02:00:00:00:00:99 10.129.126.99 0 10.129.126.2@02:00:00:00:00:02");
        let after = index();
        assert!(after.contains("0x00000400") && !after.contains("0x00000100"), "{after}");
        assert_eq!(connection.finish().split(' ').next(), Some("1"));
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn a_slot_that_is_gone_stays_for_replies_on_their_way() {
    in_netns(|| {
        let fixture = Fixture::new(&[]);
        fixture.redirect();
        assert_eq!(fixture.at_vm().as_deref(), Some("backend"));
        let received = || {
            let status = fixture.daemon.status();
            status.middleboxes[0].services[0].backends[0].reply_packets
        };
        wait_for("the count", || received() > 0);
        let before = received();
        fixture.daemon.must("R L 12:13:14:15:16:17 10.129.126.15 1 10.129.126.1 10.129.126.17");
        fixture.daemon.must(STATIC);
        let has_old =
            |map: &str| run(&format!("nft list map bridge nfqd {map}")).contains("0x00000100");
        assert!(has_old("backend_vip4") && !has_old("backend_ip4"));
        // The counters are read once a second, and no packet counts twice.
        std::thread::sleep(Duration::from_millis(2500));
        assert_eq!(received(), before);
        wait_for("its end", || !has_old("backend_vip4"));
        assert_eq!(received(), before);
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn backends_are_found_without_the_hosts_neighbour_table() {
    in_netns(|| {
        let fixture = Fixture::new(&[]);
        run("ip neigh replace 10.129.126.200 lladdr 02:00:00:00:00:c8 dev br0 nud permanent");
        let before = run("ip neigh show");
        let pool = "R L 12:13:14:15:16:17 10.129.126.15 rr 10.129.126.17 10.129.126.200";
        fixture.daemon.must(&format!("{pool} check=arp"));
        let backends = || fixture.daemon.status().middleboxes[0].services[0].backends.clone();
        wait_for("its MAC", || backends()[0].mac.as_deref() == Some("02:00:00:00:00:17"));
        wait_for("the end of the other", || backends()[1].state == BackendState::Dead);
        assert_eq!(run("ip neigh show"), before);
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn the_configuration_is_read_again() {
    in_netns(|| {
        run("ip link add br0 type bridge");
        let dir = tempfile::tempdir().unwrap();
        let (config, commands) = (dir.path().join("nfqd.toml"), dir.path().join("commands"));
        let write = |shm: &str, lines: &str| {
            let text = format!("commands = \"{}\"\n{shm}", commands.display());
            std::fs::write(&config, text).unwrap();
            std::fs::write(&commands, lines).unwrap();
        };
        write("", "R F 02:00:00:00:00:01 10.0.0.1\n");
        let daemon = Daemon::start(&["--config", config.to_str().unwrap()]);
        daemon.must("A 02:00:00:00:00:01 T 2 d 80");
        let commands_of = |at: usize| daemon.status().middleboxes[at].commands.join("; ");
        write("", "R F 02:00:00:00:00:01 10.0.0.1\nR F 02:00:00:00:00:02 10.0.0.2 # new\n");
        daemon.signal(nix::sys::signal::Signal::SIGHUP);
        wait_for("the new middlebox", || daemon.status().middleboxes.len() == 2);
        assert!(
            commands_of(0).contains("T 2 d 80"),
            "what guests have added stays: {}",
            commands_of(0)
        );
        // An invalid file changes nothing.
        write("", "X 02:00:00:00:00:01\nnonsense\n");
        daemon.signal(nix::sys::signal::Signal::SIGHUP);
        wait_for("the complaint", || daemon.log().contains("commands:2:1: 'nonsense'"));
        assert_eq!(daemon.status().middleboxes.len(), 2);
    });
}

/// Runs nfqd in conditions in which it must not start; returns its exit code and message.
fn start_error(arguments: &[&str]) -> (Option<i32>, String) {
    let state = tempfile::tempdir().unwrap();
    let output = Command::new("timeout")
        .arg("10")
        .arg(program(NFQD))
        .arg("--state")
        .arg(state.path())
        .args(arguments)
        .args(if arguments.contains(&"--control") {
            vec![]
        } else {
            vec!["--control".into(), state.path().join("c")]
        })
        .output()
        .unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn errors_at_the_start_name_their_cause() {
    in_netns(|| {
        run("ip link add br0 type bridge");
        let queue = nfqd::packet_path::queue::Queue::open(6, true).unwrap();
        let (code, message) = start_error(&["--queue", "6-7"]);
        assert_eq!(code, Some(3), "{message}");
        assert!(message.contains("queue 6 is in use") && message.contains("--queue"), "{message}");
        drop(queue);

        run("nft add table bridge nfqd");
        let (code, message) = start_error(&[]);
        assert_eq!(code, Some(3), "{message}");
        assert!(message.contains("nft delete table bridge nfqd"), "{message}");
        run("nft delete table bridge nfqd");

        let (code, message) = start_error(&["--shm", "/dev"]);
        assert_eq!(code, Some(3), "{message}");
        assert!(message.contains("/dev"), "{message}");

        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "R F 2:0:0:0:0:1 10.0.0.1\nA 2:0:0:0:0:1 I 99\n").unwrap();
        let (code, message) = start_error(&["--commands", file.path().to_str().unwrap()]);
        assert_eq!(code, Some(1), "{message}");
        assert!(message.contains(":2:17: '99': not a bit value"), "{message}");
        assert!(!run("nft list tables").contains("nfqd"), "nothing was loaded");

        let (code, message) = start_error(&["--control", "/nowhere/control"]);
        assert_eq!(code, Some(3), "{message}");
        assert!(!run("nft list tables").contains("nfqd"), "nothing was left");

        // A queue path that is asked for but missing.
        let sysctl = "/proc/sys/net/bridge/bridge-nf-call-iptables";
        let before = std::fs::read_to_string(sysctl).unwrap();
        std::fs::write(sysctl, "0").unwrap();
        let (code, message) = start_error(&["--steer", "br-netfilter"]);
        std::fs::write(sysctl, before).unwrap();
        assert_eq!(code, Some(3), "{message}");
        assert!(
            message.contains("br-netfilter.sh up") || message.contains("--steer native"),
            "{message}"
        );

        for (limit, words) in [("-n 20", "20 open files"), ("-v 100000", "97 MiB of address space")]
        {
            let run = format!("ulimit {limit}; exec \"$0\" --state /nowhere");
            let output = Command::new("sh").args(["-c", &run]).arg(program(NFQD)).output().unwrap();
            let message = String::from_utf8(output.stderr).unwrap();
            assert_eq!(output.status.code(), Some(3), "{message}");
            assert!(message.contains(words) && !message.contains("backtrace"), "{message}");
        }
        let (code, message) = start_error(&["--queue", "3-1"]);
        assert_eq!(code, Some(2), "{message}");
        // Without the privilege.
        let output = Command::new("setpriv")
            .args(["--bounding-set", "-net_admin", "--inh-caps", "-net_admin", "--"])
            .arg(program(NFQD))
            .args(["--state", "/tmp/nfqd-refused", "--control", "/tmp/nfqd-refused.sock"])
            .output()
            .unwrap();
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(3), "{message}");
        assert!(message.contains("CAP_NET_ADMIN"), "{message}");
        let _ = std::fs::remove_dir_all("/tmp/nfqd-refused");
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn check_prints_every_error_with_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("x");
    std::fs::write(&file, "# fine\nR F 2:0:0:0:0:1 10.0.0.1\nA 2:0:0:0:0:1 T 1\nX 2:0:0:0:0:9\n")
        .unwrap();
    let output = Command::new(program(NFQD)).arg("check").arg(&file).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stdout).unwrap();
    let name = file.display();
    let expected = [
        format!("{name}:3:17: '1': sets bit 1 of class T, but s has no value; add 's VALUE'"),
        format!("{name}:4:3: '2:0:0:0:0:9': not registered; Q shows what is"),
    ];
    assert_eq!(text.lines().collect::<Vec<_>>(), expected);
    std::fs::write(&file, "R F 2:0:0:0:0:1 10.0.0.1\n").unwrap();
    let output = Command::new(program(NFQD)).arg("check").arg(&file).output().unwrap();
    assert_eq!((output.status.code(), output.stdout, output.stderr), (Some(0), vec![], vec![]));
}

/// A small file system at a path, until this value is dropped.
struct SmallDisk<'a>(&'a std::path::Path);

impl SmallDisk<'_> {
    fn mount(at: &std::path::Path) -> SmallDisk<'_> {
        run(&format!("mount -t tmpfs -o size=64k nfqd-tests {}", at.display()));
        SmallDisk(at)
    }
}

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        // Unmounted lazily: the daemon may still have it open.
        run(&format!("umount -l {}", self.0.display()));
    }
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn a_full_disk_is_reported_and_the_policy_stays() {
    in_netns(|| {
        let mut fixture = Fixture::new(&[]);
        let state = std::path::PathBuf::from(fixture.daemon.status().state);
        fixture.daemon.terminate();
        let disk = SmallDisk::mount(state.parent().unwrap());
        fixture.daemon.restart();
        fixture.daemon.must("R F 12:13:14:15:16:17 10.129.126.15");
        let filler = disk.0.join("filler");
        assert!(std::fs::write(&filler, vec![0; 1 << 20]).is_err(), "the disk is full");
        // Appending to an existing page needs no room.
        let fails = (1..400).find(|n| {
            fixture.daemon.must(&format!("A 12:13:14:15:16:17 #{n} T 2 d {}", 1000 + n));
            fixture.daemon.status().state_error.is_some()
        });
        let error = fixture.daemon.status().state_error.unwrap();
        assert!(fails.is_some() && error.contains("No space left"), "{error}");
        fixture.redirect();
        assert_eq!(fixture.at_vm().as_deref(), Some("backend"));
        std::fs::remove_file(&filler).unwrap();
        wait_for("the state is saved again", || fixture.daemon.status().state_error.is_none());
        let saved = std::fs::read_to_string(&state).unwrap();
        assert!(
            saved.contains(STATIC) && saved.contains(&format!("#{} T", fails.unwrap())),
            "{saved}"
        );
        // After a kill, it restores everything.
        let commands = fixture.daemon.status().middleboxes[0].commands.clone();
        fixture.daemon.kill();
        fixture.daemon.restart();
        assert_eq!(fixture.daemon.status().middleboxes[0].commands, commands);
        fixture.daemon.terminate();
    });
}

/// Sends many requests at once, and returns how many answers have each of two forms.
fn ask_often(socket: &std::path::Path, count: usize) -> (usize, usize) {
    use std::io::{BufRead, BufReader, Write};
    let stream = std::os::unix::net::UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut reader = BufReader::new(&stream);
    let (mut answered, mut busy) = (0, 0);
    for _ in 0..count {
        (&stream).write_all(b"{\"v\":1,\"ask\":\"status\"}\n").unwrap();
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        answered += usize::from(line.contains("\"status\":{"));
        busy += usize::from(line.contains("\"code\":\"busy\""));
    }
    (answered, busy)
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn observers_cannot_keep_the_daemon_busy_and_root_is_answered() {
    in_netns(|| {
        run("ip link add br0 type bridge");
        let daemon = Daemon::start(&[]);
        let observe = daemon.control().with_file_name("observe");
        // More than a second's share, and than that of the next second, which may have begun.
        let (answered, busy) = ask_often(&observe, 3000);
        assert_eq!(answered + busy, 3000);
        assert!(answered >= 200 && busy > 0, "{answered} answered, {busy} busy");
        assert_eq!(ask_often(&daemon.control(), 300), (300, 0));
        daemon.must("R F 12:13:14:15:16:17 10.129.126.15");
    });
}
