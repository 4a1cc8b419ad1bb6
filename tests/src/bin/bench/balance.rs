//! A balanced service with real programs, beside what it stands in for: the plain bridge straight
//! to the backend, and in the middlebox' place HAProxy in TCP mode, nginx's stream module, NAT by
//! nftables and, where the kernel has it, IPVS.
//!
//! All stand at the same time; each is measured in turn, round after round, and compared with the
//! plain bridge of its round. Throughput is iperf3's, requests are wrk's against nginx. Needs the
//! Debian packages haproxy, nginx, libnginx-mod-stream, iperf3, wrk and ipvsadm; what is missing is
//! left out, and said.

use crate::print;
use nfqd_tests::daemon::Daemon;
use nfqd_tests::netns::{Host, in_netns};
use nfqd_tests::topology::{BACKEND_MAC, Topology, VM, VM_MAC, connect_plain, wait_for};
use std::collections::BTreeMap;
use std::io::Write;
use std::process::{Child, Stdio};

const BACKEND: &str = "10.129.126.17";
/// Another address of the backend's host, for the plain bridge: a client that talks to a backend by its
/// own address and through the balancer from one port would have one conversation too many with it.
const PLAIN: &str = "10.129.126.27";
/// And by a third, whose answers go back through IPVS.
const BEHIND_IPVS: &str = "10.129.126.37";
/// The ports at which the backend serves requests and streams.
const WEB: u16 = 80;
const STREAM: u16 = 5201;
const ROUNDS: usize = 5;

/// A way to the backend: the address and ports that a client uses.
struct Way {
    name: &'static str,
    to: String,
    web: u16,
    stream: u16,
}

/// Programs that end with this value.
#[derive(Default)]
struct Programs(Vec<Child>);

impl Programs {
    fn start(&mut self, host: &Host, program: &str, arguments: &[&str]) {
        let mut child = host.command(program);
        child.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.0.push(child.spawn().expect(program));
    }
}

impl Drop for Programs {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // In order, so that they end their workers.
            let pid = nix::unistd::Pid::from_raw(child.id() as i32);
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
            let _ = child.wait();
        }
    }
}

fn is_there(program: &str) -> bool {
    let found = std::env::var_os("PATH").is_some_and(|path| {
        std::env::split_paths(&path).any(|folder| folder.join(program).exists())
    });
    if !found {
        println!("SKIPPED: what needs {program}, which is not installed");
    }
    found
}

fn file(dir: &std::path::Path, name: &str, text: &str) -> String {
    let path = dir.join(name);
    std::fs::File::create(&path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .expect("a file");
    path.display().to_string()
}

/// Runs it and prints what came out.
pub(crate) fn run() {
    if !["nginx", "wrk", "iperf3"].into_iter().all(is_there) {
        return;
    }
    in_netns(|| {
        let dir = tempfile::tempdir().expect("directory");
        let topology = Topology::new(true);
        let vm = topology.vm.as_ref().expect("a middlebox");
        topology.backend.run(&format!("ip addr add {PLAIN}/24 dev eth0"));
        let mut programs = Programs::default();
        let web = "daemon off; master_process on; worker_processes 1; pid PATH/web.pid; error_log stderr;
            events { worker_connections 8192; }
            http { access_log off; keepalive_requests 1000000000; client_body_temp_path PATH/b; proxy_temp_path PATH/p;
                fastcgi_temp_path PATH/f; uwsgi_temp_path PATH/u; scgi_temp_path PATH/s;
                server { listen 80 backlog=8192; location / { return 200 \"a short answer of forty bytes or nearly so\\n\"; } } }";
        // Never /dev/null: nginx removes the file of its process id.
        let temp = dir.path().display().to_string();
        let web = web.replace("PATH", &temp);
        programs.start(&topology.backend, "nginx", &["-c", &file(dir.path(), "web.conf", &web)]);
        programs.start(&topology.backend, "iperf3", &["-s", "-p", &STREAM.to_string()]);
        let daemon = Daemon::start(&[]);
        for port in [WEB, STREAM] {
            daemon.must(&format!("R L {VM_MAC} {VM}:{port}/tcp rr {BACKEND}@{BACKEND_MAC}"));
        }
        let vm_ip = VM.to_string();
        let mut ways = vec![
            Way { name: "plain bridge", to: PLAIN.to_string(), web: WEB, stream: STREAM },
            Way { name: "nfqd", to: vm_ip.clone(), web: WEB, stream: STREAM },
        ];
        let mut proxy = |name: &'static str, at: u16| {
            ways.push(Way { name, to: vm_ip.clone(), web: 8000 + at, stream: 5300 + at });
        };
        if is_there("haproxy") {
            let text = format!(
                "global\n maxconn 4000\n nbthread 2\ndefaults\n mode tcp\n timeout connect 5s\n timeout client 60s\n \
                 timeout server 60s\nlisten web\n bind :8001 backlog 8192\n server s {BACKEND}:{WEB}\nlisten stream\n \
                 bind :5301\n server s {BACKEND}:{STREAM}\n"
            );
            programs.start(vm, "haproxy", &["-db", "-f", &file(dir.path(), "haproxy.cfg", &text)]);
            proxy("HAProxy, TCP mode", 1);
        }
        let module = "/usr/lib/nginx/modules/ngx_stream_module.so";
        if std::path::Path::new(module).exists() {
            let text = format!(
                "load_module {module}; daemon off; worker_processes 2; pid {temp}/stream.pid; error_log stderr;
                 events {{ worker_connections 8192; }}
                 stream {{ server {{ listen 8002 backlog=8192; proxy_pass {BACKEND}:{WEB}; }}
                           server {{ listen 5302; proxy_pass {BACKEND}:{STREAM}; }} }}"
            );
            programs.start(vm, "nginx", &["-c", &file(dir.path(), "stream.conf", &text)]);
            proxy("nginx stream", 2);
        } else {
            println!("SKIPPED: nginx stream, there is no {module}");
        }
        vm.run("sysctl -qw net.ipv4.ip_forward=1");
        vm.run("sysctl -qw net.ipv4.conf.all.send_redirects=0");
        vm.run("sysctl -qw net.ipv4.conf.eth0.send_redirects=0");
        if nat(vm, dir.path()) {
            proxy("nft NAT", 3);
        }
        if is_there("ipvsadm") && ipvs(vm, &topology.backend) {
            proxy("IPVS", 4);
        }
        for way in &ways {
            let to = way.to.parse().expect("an address");
            wait_for(way.name, || {
                connect_plain(&topology.client, to, way.web)
                    && connect_plain(&topology.client, to, way.stream)
            });
        }
        measure(&topology.client, &ways, dir.path());
        let status = daemon.status();
        println!("steer {}, {} packets went to the engine", status.steer, daemon.queued_packets());
    });
}

/// NAT in the middlebox' place: destination to the backend, source to the middlebox, so that
/// answers come back.
fn nat(vm: &Host, dir: &std::path::Path) -> bool {
    let text = format!(
        "table ip nat {{
            chain prerouting {{ type nat hook prerouting priority dstnat;
                tcp dport 8003 dnat to {BACKEND}:{WEB}
                tcp dport 5303 dnat to {BACKEND}:{STREAM}
            }}
            chain postrouting {{ type nat hook postrouting priority srcnat;
                ip daddr {BACKEND} masquerade
            }}
        }}"
    );
    let path = file(dir, "nat.nft", &text);
    let done =
        vm.command("nft").args(["-f", &path]).output().is_ok_and(|output| output.status.success());
    if !done {
        println!("SKIPPED: nft NAT, this kernel has none");
    }
    done
}

/// IPVS in the middlebox' place, as its users set it up: the backend's way back leads through it.
fn ipvs(vm: &Host, backend: &Host) -> bool {
    let add = |line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        vm.command("ipvsadm").args(words).output().is_ok_and(|output| output.status.success())
    };
    let done = [("8004", WEB), ("5304", STREAM)].iter().all(|(port, to)| {
        add(&format!("-A -t {VM}:{port} -s rr"))
            && add(&format!("-a -t {VM}:{port} -r {BEHIND_IPVS}:{to} -m"))
    });
    if !done {
        println!("SKIPPED: IPVS, this kernel has none");
        return false;
    }
    backend.run(&format!("ip addr add {BEHIND_IPVS}/32 dev eth0"));
    backend.run(&format!("ip rule add from {BEHIND_IPVS} table 100"));
    backend.run(&format!("ip route add default via {VM} dev eth0 table 100"));
    true
}

/// The metrics, and whether more is better.
const MEASURES: [(&str, &str); 10] = [
    ("stream", "Gbit/s"),
    ("stream back", "Gbit/s"),
    ("8 streams", "Gbit/s"),
    ("8 streams back", "Gbit/s"),
    ("connections", "/s"),
    ("requests", "/s"),
    ("p50", "us"),
    ("p99", "us"),
    ("p99.9", "us"),
    ("connect p50", "us"),
];

fn measure(client: &Host, ways: &[Way], dir: &std::path::Path) {
    let script = "done = function(summary, latency, requests)
        local e = summary.errors
        io.write(string.format('RESULT %f %d %d %d %d\\n', summary.requests / summary.duration * 1e6,
            latency:percentile(50), latency:percentile(99), latency:percentile(99.9),
            e.connect + e.read + e.write + e.status + e.timeout))
    end\n";
    let keep = file(dir, "keep.lua", script);
    let close = file(dir, "close.lua", &format!("wrk.headers['Connection'] = 'close'\n{script}"));
    let seconds = if std::env::var_os("NFQD_BENCH_SHORT").is_some() { 1 } else { 2 };
    let mut all: BTreeMap<(&str, &str), Vec<f64>> = BTreeMap::new();
    for round in 0..=ROUNDS {
        // Whoever begins in one round ends in the next.
        let order: Vec<&Way> =
            if round % 2 == 0 { ways.iter().collect() } else { ways.iter().rev().collect() };
        for way in order {
            let mut add = |name: &'static str, value: f64| {
                // The first round warms up.
                if round > 0 {
                    all.entry((name, way.name)).or_default().push(value);
                }
            };
            for (name, options) in [
                ("stream", ""),
                ("stream back", "-R"),
                ("8 streams", "-P 8"),
                ("8 streams back", "-P 8 -R"),
            ] {
                add(name, iperf(client, way, options, seconds));
            }
            let url = format!("http://{}:{}/", way.to, way.web);
            let [rate, p50, p99, p999] = wrk(client, &keep, &url, 32, seconds);
            [("requests", rate), ("p50", p50), ("p99", p99), ("p99.9", p999)]
                .into_iter()
                .for_each(|(name, value)| add(name, value));
            let [rate, p50, ..] = wrk(client, &close, &url, 32, seconds);
            add("connections", rate);
            add("connect p50", p50);
        }
    }
    for (measure, unit) in MEASURES {
        println!("-- {measure}");
        let plain = all[&(measure, ways[0].name)].clone();
        for way in ways {
            let values = &all[&(measure, way.name)];
            print(way.name, values, unit);
            if way.name != ways[0].name {
                let ratios: Vec<f64> =
                    values.iter().zip(&plain).map(|(value, plain)| value / plain).collect();
                print(&format!("    {} to the plain bridge's", way.name), &ratios, "");
            }
        }
    }
}

/// Bits a second that a client has sent, or with `-R` received.
fn iperf(client: &Host, way: &Way, options: &str, seconds: u32) -> f64 {
    let line = format!("-J -c {} -p {} -t {seconds} {options}", way.to, way.stream);
    let output = client.command("iperf3").args(line.split_whitespace()).output().expect("iperf3");
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).expect("iperf3's answer");
    let rate = json["end"]["sum_received"]["bits_per_second"].as_f64();
    rate.unwrap_or_else(|| panic!("{}: {}", way.name, json["error"])) / 1e9
}

/// Requests a second, and the latencies of half, 99 % and 99.9 % of them in microseconds.
fn wrk(client: &Host, script: &str, url: &str, connections: u32, seconds: u32) -> [f64; 4] {
    let line = format!("-t 1 -c {connections} -d {seconds}s -s {script} {url}");
    let output = client.command("wrk").args(line.split_whitespace()).output().expect("wrk");
    let text = String::from_utf8_lossy(&output.stdout);
    let result = text
        .lines()
        .find_map(|line| line.strip_prefix("RESULT "))
        .unwrap_or_else(|| panic!("{url}: {text}{}", String::from_utf8_lossy(&output.stderr)));
    let numbers: Vec<f64> = result.split(' ').filter_map(|word| word.parse().ok()).collect();
    assert!(numbers[4] <= numbers[0] * 0.001, "{url}: {} errors", numbers[4]);
    [numbers[0], numbers[1], numbers[2], numbers[3]]
}
