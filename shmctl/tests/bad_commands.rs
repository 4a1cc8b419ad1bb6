//! Bad commands: each is rejected with a message that names the token, its column, and what to write
//! instead.
#![allow(clippy::unwrap_used)]

use nfqd_shmctl::ErrorCode::{self, Syntax, Value};
use nfqd_shmctl::{Class, Command};

/// The line (`MB` stands for 2:0:0:0:0:1), the code, the token that is wrong (nothing: the command
/// ends too early), and words of the remedy.
const BAD: &[(&str, ErrorCode, &str, &str)] = &[
    // No command.
    ("", Syntax, "", "empty; write R"),
    ("   ", Syntax, "", "empty; write R"),
    ("\t", Syntax, "", "empty; write R"),
    ("Z MB", Syntax, "Z", "not a command; write R (register)"),
    ("RF MB 10.0.0.1", Syntax, "RF", "write R (register)"),
    ("register", Syntax, "register", "A (add filters)"),
    ("R,F", Syntax, "R,F", "not a command"),
    ("@R F MB 10.0.0.1@", Syntax, "@R", "not a command"),
    ("#1", Syntax, "#1", "not a command"),
    ("12:13:14:15:16:17", Syntax, "12:13:14:15:16:17", "not a command"),
    ("É MB", Syntax, "É", "not a command"),
    // R.
    ("R", Syntax, "", "F (firewall) or L"),
    ("R G MB 10.0.0.1", Syntax, "G", "not a service; write F (firewall)"),
    ("R MB 10.0.0.1", Syntax, "MB", "write F (firewall) or L (load balancing)"),
    ("R FL MB 10.0.0.1", Syntax, "FL", "not a service"),
    // R F.
    ("R F", Syntax, "", "write six hexadecimal bytes"),
    ("R F 12:13:14:15:16 10.0.0.1", Value, "12:13:14:15:16", "not a MAC address"),
    ("R F 12:13:14:15:16:17:18 10.0.0.1", Value, "12:13:14:15:16:17:18", "not a MAC address"),
    ("R F 12-13-14-15-16-17 10.0.0.1", Value, "12-13-14-15-16-17", "like 12:13:14:15:16:17"),
    ("R F 1213.1415.1617 10.0.0.1", Value, "1213.1415.1617", "like 12:13:14:15:16:17"),
    ("R F 12:13:14:15:16:1g 10.0.0.1", Value, "12:13:14:15:16:1g", "hexadecimal"),
    ("R F 012:13:14:15:16:17 10.0.0.1", Value, "012:13:14:15:16:17", "not a MAC address"),
    ("R F +2:0:0:0:0:1 10.0.0.1", Value, "+2:0:0:0:0:1", "not a MAC address"),
    ("R F :::::1 10.0.0.1", Value, ":::::1", "not a MAC address"),
    ("R F 10.0.0.1 MB", Value, "10.0.0.1", "not a MAC address"),
    (
        "R F 1:0:0:0:0:1 10.0.0.1",
        Value,
        "1:0:0:0:0:1",
        "not a unicast MAC address; write that of the middlebox",
    ),
    ("R F ff:ff:ff:ff:ff:ff 10.0.0.1", Value, "ff:ff:ff:ff:ff:ff", "unicast MAC address"),
    ("R F 0:0:0:0:0:0 10.0.0.1", Value, "0:0:0:0:0:0", "unicast MAC address"),
    ("R F MB", Syntax, "", "write one like 10.129.126.15"),
    ("R F MB 10.0.0.256", Value, "10.0.0.256", "not an IP address"),
    ("R F MB 10.0.0", Value, "10.0.0", "not an IP address"),
    ("R F MB 10.0.0.01", Value, "10.0.0.01", "not an IP address"),
    ("R F MB 10.0.0.0/8", Value, "10.0.0.0/8", "not an IP address; write one like"),
    ("R F MB 10.0.0.1-10.0.0.2", Value, "10.0.0.1-10.0.0.2", "not an IP address"),
    ("R F MB host.example", Value, "host.example", "like 10.129.126.15 or 2001:db8::1"),
    ("R F MB 2001:db8:::1", Value, "2001:db8:::1", "not an IP address"),
    ("R F MB fe80::1%eth0", Value, "fe80::1%eth0", "not an IP address"),
    ("R F MB [2001:db8::1]", Value, "[2001:db8::1]", "not an IP address"),
    ("R F MB 224.0.0.1", Value, "224.0.0.1", "write its unicast address"),
    ("R F MB 0.0.0.0", Value, "0.0.0.0", "one host on the bridge"),
    ("R F MB 127.0.0.1", Value, "127.0.0.1", "one host on the bridge"),
    ("R F MB 255.255.255.255", Value, "255.255.255.255", "one host on the bridge"),
    ("R F MB ff02::1", Value, "ff02::1", "unicast"),
    ("R F MB ::1", Value, "::1", "unicast"),
    ("R F MB 10.0.0.1 x", Syntax, "x", "write allow or deny"),
    ("R F MB 10.0.0.1 drop", Syntax, "drop", "write allow or deny"),
    ("R F MB 10.0.0.1 0", Syntax, "0", "write allow or deny"),
    ("R F MB 10.0.0.1 deny deny", Syntax, "deny", "the command is complete without it"),
    // R L.
    ("R L", Syntax, "", "six hexadecimal bytes"),
    ("R L 3:0:0:0:0:1 10.0.0.1 0 10.0.0.2", Value, "3:0:0:0:0:1", "unicast MAC"),
    ("R L MB", Syntax, "", "10.129.126.15"),
    ("R L MB nothing 0 10.0.0.2", Value, "nothing", "not an address or a port of one"),
    ("R L MB 239.1.1.1 0 10.0.0.2", Value, "239.1.1.1", "unicast address"),
    ("R L MB 10.0.0.1", Syntax, "", "0 (static), 1 (source)"),
    ("R L MB 10.0.0.1 7 10.0.0.2", Value, "7", "not a balancing method; write 0 (static)"),
    ("R L MB 10.0.0.1 -1 10.0.0.2", Syntax, "-1", "not a balancing method"),
    ("R L MB 10.0.0.1 10.0.0.2", Syntax, "10.0.0.2", "not a balancing method"),
    ("R L MB 10.0.0.1 random 10.0.0.2", Syntax, "random", "not a balancing method"),
    ("R L MB 10.0.0.1 rr", Syntax, "", "not a destination"),
    ("R L MB 10.0.0.1 3 10.0.0.2 10.0.0.2", Value, "10.0.0.2", "named twice"),
    ("R L MB 10.0.0.1 LEAST dsr 10.0.0.2", Value, "dsr", "not a destination"),
    ("R L MB 10.0.0.1 0", Syntax, "", "like 10.129.126.17, or 10.129.126.17@MAC"),
    ("R L MB 10.0.0.1 0 backend", Value, "backend", "not a destination"),
    ("R L MB 10.0.0.1 0 10.0.0.1", Value, "10.0.0.1", "write the address of another host"),
    ("R L MB 10.0.0.1 0 2001:db8::1", Value, "2001:db8::1", "write an IPv4 address"),
    ("R L MB 2001:db8::9 0 10.0.0.1", Value, "10.0.0.1", "write an IPv6 address"),
    ("R L MB 10.0.0.1 0 10.0.0.2@1:2:3", Value, "10.0.0.2@1:2:3", "behind the @"),
    ("R L MB 10.0.0.1 0 10.0.0.2@", Value, "10.0.0.2@", "behind the @"),
    ("R L MB 10.0.0.1 0 @2:0:0:0:0:2", Value, "@2:0:0:0:0:2", "not a destination"),
    (
        "R L MB 10.0.0.1 0 10.0.0.2@1:0:5e:0:0:1",
        Value,
        "10.0.0.2@1:0:5e:0:0:1",
        "unicast MAC address",
    ),
    ("R L MB 10.0.0.1 0 10.0.0.2@MB@MB", Value, "10.0.0.2@MB@MB", "behind the @"),
    ("R L MB 10.0.0.1 0 224.0.0.2@MB", Value, "224.0.0.2@MB", "unicast"),
    ("R L MB 10.0.0.1 0 10.0.0.2:80", Value, "10.0.0.2:80", "registered address has none"),
    ("R L MB 10.0.0.1 0 10.0.0.2*0", Value, "10.0.0.2*0", "write one from 1 to 1000"),
    ("R L MB [2001:db8::9]:80 0 [2001:db8::1]:0", Value, "[2001:db8::1]:0", "[ip]:port for IPv6"),
    (
        "R L MB 10.0.0.1 0 10.0.0.2 10.0.0.3",
        Syntax,
        "10.0.0.3",
        "methods static and source take one destination",
    ),
    ("R L MB 10.0.0.1 0 10.0.0.2 dsr DSR", Syntax, "DSR", "give each once"),
    ("R L MB 10.0.0.1 0 10.0.0.2 affinity", Syntax, "affinity", "then only dsr"),
    ("R L MB 10.0.0.1:0 rr 10.0.0.2", Value, "10.0.0.1:0", "10.129.126.15:80"),
    ("R L MB 10.0.0.1:80/sctp rr 10.0.0.2", Value, "10.0.0.1:80/sctp", "10.129.126.15:53/udp"),
    ("R L MB 10.0.0.1:65536 rr 10.0.0.2", Value, "10.0.0.1:65536", "not an address or a port"),
    ("R L MB 2001:db8::1:80/tcp rr 2001:db8::2", Value, "2001:db8::1:80/tcp", "[2001:db8::1]:80"),
    ("R L MB 10.0.0.1 rr 10.0.0.2*1001", Value, "10.0.0.2*1001", "write one from 1 to 1000"),
    ("R L MB 10.0.0.1 rr 10.0.0.2*", Value, "10.0.0.2*", "there is no weight"),
    ("R L MB 10.0.0.1 rr 10.0.0.2*2@MB", Value, "10.0.0.2*2@MB", "there is no weight"),
    ("R L MB 10.0.0.1 rr 10.0.0.2 2001:db8::1", Value, "2001:db8::1", "write an IPv4 address"),
    ("R L MB 10.0.0.1:80 rr 10.0.0.2 10.0.0.2:80", Value, "10.0.0.2:80", "named twice"),
    ("R L MB 10.0.0.1 rr 10.0.0.2 10.0.0.1", Value, "10.0.0.1", "own address"),
    ("R L MB 10.0.0.1:80 rr 10.0.0.2:81 dsr", Value, "dsr", "omit the backends' ports"),
    (
        "R L MB 10.0.0.1 rr 10.0.0.2 10.0.0.3:80",
        Value,
        "10.0.0.3:80",
        "registered address has none",
    ),
    ("R L MB 10.0.0.1 rr 10.0.0.2 fast", Syntax, "fast", "options are dsr, affinity"),
    ("R L MB 10.0.0.1 rr 10.0.0.2 affinity=1", Syntax, "affinity=1", "not an option"),
    ("R L MB 10.0.0.1 rr 10.0.0.2 dsr 10.0.0.3", Syntax, "10.0.0.3", "not an option"),
    ("R L MB 10.0.0.1 hash 10.0.0.2 seed=x", Value, "seed=x", "a number from 0"),
    ("R L MB 10.0.0.1 hash 10.0.0.2 seed=4294967296", Value, "seed=4294967296", "a number from 0"),
    ("R L MB 10.0.0.1 hash 10.0.0.2 seed", Syntax, "seed", "not an option"),
    ("R L MB 10.0.0.1 rr 10.0.0.2 check=ping", Value, "check=ping", "check=tcp:PORT"),
    ("R L MB 10.0.0.1 rr 10.0.0.2 check=tcp:0", Value, "check=tcp:0", "check=tcp:PORT"),
    ("R L MB 10.0.0.1 rr 10.0.0.2 dsr check=tcp", Value, "check=tcp", "write check=tcp:PORT"),
    ("R L MB 10.0.0.1 rr 10.0.0.2 dsr 10.0.0.3", Syntax, "10.0.0.3", "behind all destinations"),
    (
        "R L MB 10.0.0.1 rr 10.0.0.2 on-dead=drop",
        Value,
        "on-dead=drop",
        "write move, reset or keep",
    ),
    ("R L MB 10.0.0.1 rr 10.0.0.2 on-empty=drop", Value, "on-empty=drop", "write reject or pass"),
    (
        "R L MB 10.0.0.1 rr 10.0.0.2 on-dead=keep on-dead=keep",
        Syntax,
        "on-dead=keep",
        "give each once",
    ),
    ("B", Syntax, "", "six hexadecimal bytes"),
    ("B MB", Syntax, "", "not a change; write +"),
    ("B MB 10.0.0.1", Syntax, "", "not a change; write +"),
    ("B MB * 10.0.0.1", Value, "*", "not an address or a port"),
    ("B MB 10.0.0.1:x + 10.0.0.2", Value, "10.0.0.1:x", "not an address or a port"),
    ("B MB +", Syntax, "", "not a destination"),
    ("B MB + host", Value, "host", "not a destination"),
    ("B MB - 10.0.0.2 drain", Syntax, "drain", "complete without it"),
    ("B MB = 10.0.0.2", Syntax, "", "write drain"),
    ("B MB = 10.0.0.2 down", Syntax, "down", "write drain"),
    ("B MB = drain", Value, "drain", "not a destination"),
    ("B MB = 10.0.0.2 drain up", Syntax, "up", "complete without it"),
    ("B MB 10.0.0.1 + 10.0.0.1", Value, "10.0.0.1", "own address"),
    ("B MB + 10.0.0.2 2001:db8::1", Value, "2001:db8::1", "write an IPv4 address"),
    ("R L MB 2001:db8::9 rr ::ffff:127.0.0.1", Value, "::ffff:127.0.0.1", "unicast"),
    ("B MB + 239.1.1.1", Value, "239.1.1.1", "unicast"),
    ("X MB L everything", Value, "everything", "not an address or a port"),
    ("X MB F 10.0.0.1", Syntax, "10.0.0.1", "complete without it"),
    ("R L MB 10.0.0.1 1", Syntax, "", "not an IP address"),
    ("R L MB 10.0.0.1 1 10.0.0.0/8 10.0.0.2", Value, "10.0.0.0/8", "not an IP address"),
    ("R L MB 10.0.0.1 1 2001:db8::1 10.0.0.2", Value, "2001:db8::1", "IPv4 address"),
    ("R L MB 10.0.0.1 1 0.0.0.0 10.0.0.2", Value, "0.0.0.0", "unicast"),
    ("R L MB 10.0.0.1 1 10.0.0.2", Syntax, "", "not a destination"),
    ("R L MB 10.0.0.1 source 10.0.0.2 10.0.0.1", Value, "10.0.0.1", "own address"),
    // A: the rule, the class, the value.
    ("A", Syntax, "", "not a MAC address"),
    ("A 1", Value, "1", "not a MAC address"),
    ("A MB", Syntax, "", "not a filter class; write I (IP fields)"),
    ("A MB #0 I 1", Value, "#0", "write #1 to #65535"),
    ("A MB #65536 I 1", Value, "#65536", "write #1 to #65535"),
    ("A MB #x I 1", Value, "#x", "write #1 to #65535"),
    ("A MB # I 1", Value, "#", "write #1 to #65535"),
    ("A MB #-1 I 1", Value, "#-1", "write #1 to #65535"),
    ("A MB #1.5 I 1", Value, "#1.5", "not a rule"),
    ("A MB +0 I 1", Value, "+0", "+1 to +65535 for one that allows"),
    ("A MB +65536 I 1", Value, "+65536", "for one that allows"),
    ("A MB + 1 I 1", Value, "+", "for one that allows"),
    ("A MB ++1 I 1", Value, "++1", "not a rule"),
    ("A MB #+1 I 1", Value, "#+1", "not a rule"),
    ("A MB 1 I 1", Syntax, "1", "not a filter class"),
    ("A MB #1", Syntax, "", "not a filter class"),
    ("A MB #1 #2 I 1", Syntax, "#2", "not a filter class"),
    ("A MB Q 1", Syntax, "Q", "T (TCP ports), U (UDP ports), V (VLAN id)"),
    ("A MB II 1", Syntax, "II", "not a filter class"),
    ("A MB I", Syntax, "", "write a number from 0 to 15"),
    ("A MB I 16", Value, "16", "write a number from 0 to 15"),
    ("A MB I 256", Value, "256", "0 to 15"),
    ("A MB I -1", Value, "-1", "0 to 15"),
    ("A MB I 0x1", Value, "0x1", "0 to 15"),
    ("A MB I 1.0", Value, "1.0", "0 to 15"),
    ("A MB I s", Value, "s", "0 to 15"),
    ("A MB M 8", Value, "8", "0 to 7"),
    ("A MB T 4", Value, "4", "0 to 3"),
    ("A MB U 4", Value, "4", "0 to 3"),
    ("A MB V 2", Value, "2", "0 to 1"),
    ("A MB C 4", Value, "4", "0 to 3"),
    ("A MB N 4", Value, "4", "0 to 3"),
    ("A MB F 2", Value, "2", "0 to 1"),
    ("A MB P 4", Value, "4", "0 to 3"),
    // A: keys.
    ("A MB I 1 x 5", Syntax, "x", "its keys are s, d, t, p"),
    ("A MB M 1 t 5", Syntax, "t", "its keys are s, d, p"),
    ("A MB T 1 t 5", Syntax, "t", "its keys are s, d"),
    ("A MB U 1 p 5", Syntax, "p", "its keys are s, d"),
    ("A MB V 1 d 5", Syntax, "d", "its keys are s"),
    ("A MB C 1 s 5", Syntax, "s", "its keys are t, c"),
    ("A MB N 1 s 5", Syntax, "s", "its keys are t, c"),
    ("A MB F 1 t syn", Syntax, "t", "its keys are f"),
    ("A MB P 1 s 5", Syntax, "s", "its keys are l, f"),
    ("A MB I 1 s=10.0.0.1", Syntax, "s=10.0.0.1", "not a key of this class"),
    ("A MB I 1 10.0.0.1", Syntax, "10.0.0.1", "not a key of this class"),
    ("A MB I 1 s 10.0.0.1 10.0.0.2", Syntax, "10.0.0.2", "not a key of this class"),
    ("A MB I 1 s 10.0.0.1 s 10.0.0.2", Syntax, "s", "name each key once"),
    ("A MB I 2 d d", Syntax, "d", "name each key once"),
    ("A MB P 3 l 5 L 6", Syntax, "L", "name each key once"),
    ("A MB I 1 é", Syntax, "é", "not a key of this class"),
    // A: values.
    ("A MB I 1 s", Syntax, "", "not an IP address, prefix or range"),
    ("A MB I 1 s s", Value, "s", "not an IP address, prefix or range"),
    ("A MB I 1 s 10.0.0.0/33", Value, "10.0.0.0/33", "like 10.129.126.15, 10.0.0.0/8"),
    ("A MB I 1 s 10.0.0.0/", Value, "10.0.0.0/", "prefix or range"),
    ("A MB I 1 s 10.0.0.0/+8", Value, "10.0.0.0/+8", "prefix or range"),
    ("A MB I 1 s 10.0.0.0/255.0.0.0", Value, "10.0.0.0/255.0.0.0", "prefix or range"),
    ("A MB I 1 s 10/8", Value, "10/8", "prefix or range"),
    ("A MB I 1 s ::/129", Value, "::/129", "2001:db8::/32"),
    ("A MB I 1 s 10.0.0.9-10.0.0.1", Value, "10.0.0.9-10.0.0.1", "10.0.0.1-10.0.0.9"),
    ("A MB I 1 s 10.0.0.1-", Value, "10.0.0.1-", "prefix or range"),
    ("A MB I 1 s 10.0.0.1-9", Value, "10.0.0.1-9", "prefix or range"),
    ("A MB I 1 s 10.0.0.1-2001:db8::1", Value, "10.0.0.1-2001:db8::1", "prefix or range"),
    ("A MB I 1 s 10.0.0.1,10.0.0.2", Value, "10.0.0.1,10.0.0.2", "prefix or range"),
    ("A MB I 2 d nowhere", Value, "nowhere", "prefix or range"),
    ("A MB I 4 t", Syntax, "", "a number from 0 to 255"),
    ("A MB I 4 t 256", Value, "256", "not a TOS byte"),
    ("A MB I 4 t 0x100", Value, "0x100", "not a TOS byte"),
    ("A MB I 4 t 0x", Value, "0x", "not a TOS byte"),
    ("A MB I 4 t 1-2", Value, "1-2", "not a TOS byte"),
    ("A MB I 4 t ef", Value, "ef", "not a TOS byte"),
    ("A MB I 8 p", Syntax, "", "a name like tcp"),
    ("A MB I 8 p http", Value, "http", "not an IP protocol"),
    ("A MB I 8 p 256", Value, "256", "not an IP protocol"),
    ("A MB I 8 p 0x+6", Value, "0x+6", "not an IP protocol"),
    ("A MB M 1 s", Syntax, "", "not a MAC address"),
    ("A MB M 1 s 1:2", Value, "1:2", "or with a mask"),
    ("A MB M 1 s MB/24", Value, "MB/24", "or with a mask"),
    ("A MB M 1 s MB/", Value, "MB/", "or with a mask"),
    ("A MB M 2 d 1:2:3", Value, "1:2:3", "six hexadecimal bytes"),
    ("A MB M 2 d MB/ff:ff:ff:0:0:0", Value, "MB/ff:ff:ff:0:0:0", "six hexadecimal bytes"),
    ("A MB M 4 p", Syntax, "", "write ip, arp, ip6"),
    ("A MB M 4 p 2048", Value, "2048", "8 is 0x0800"),
    ("A MB M 4 p 0x05ff", Value, "0x05ff", "from 0x0600 up"),
    ("A MB M 4 p 0x10800", Value, "0x10800", "from 0x0600 up"),
    ("A MB M 4 p ipv4", Value, "ipv4", "write ip, arp, ip6"),
    ("A MB T 1 s", Syntax, "", "not a port"),
    ("A MB T 2 d", Syntax, "", "not a port"),
    ("A MB T 1 s 65536", Value, "65536", "0 to 65535, or two like 80-90"),
    ("A MB T 1 s http", Value, "http", "not a port"),
    ("A MB T 1 s 80,81", Value, "80,81", "not a port"),
    ("A MB T 1 s 80-", Value, "80-", "not a port"),
    ("A MB T 2 d 1-65536", Value, "1-65536", "not a port"),
    ("A MB U 1 s", Syntax, "", "not a port"),
    ("A MB U 2 d", Syntax, "", "not a port"),
    ("A MB U 1 s 90-80", Value, "90-80", "two like 80-90"),
    ("A MB U 2 d -53", Value, "-53", "not a port"),
    ("A MB V 1 s", Syntax, "", "not a VLAN id"),
    ("A MB V 1 s 4096", Value, "4096", "0 to 4095"),
    ("A MB V 1 s 10-4096", Value, "10-4096", "two like 100-199"),
    ("A MB C 1 t", Syntax, "", "not an ICMP type"),
    ("A MB C 1 t 256", Value, "256", "0 to 255"),
    ("A MB C 1 t ping", Value, "ping", "a name like echo-request"),
    ("A MB C 1 t nd-router-advert", Value, "nd-router-advert", "not an ICMP type"),
    ("A MB C 2 c", Syntax, "", "not a code"),
    ("A MB C 2 c 0-256", Value, "0-256", "not a code"),
    ("A MB N 1 t", Syntax, "", "like nd-router-advert"),
    ("A MB N 2 c", Syntax, "", "not a code"),
    ("A MB N 1 t redirect", Value, "redirect", "not an ICMPv6 type"),
    ("A MB N 1 t 137-133", Value, "137-133", "two like 133-137"),
    ("A MB N 2 c x", Value, "x", "not a code"),
    ("A MB F 1 f", Syntax, "", "not TCP flags"),
    ("A MB F 1 f sin", Value, "sin", "fin syn rst psh ack urg ece cwr"),
    ("A MB F 1 f syn,", Value, "syn,", "like syn,ack"),
    ("A MB F 1 f syn/ack", Value, "syn/ack", "behind a /"),
    ("A MB F 1 f none/none", Value, "none/none", "not TCP flags"),
    ("A MB F 1 f 2", Value, "2", "not TCP flags"),
    ("A MB P 1 l", Syntax, "", "not a length"),
    ("A MB P 1 l 65536", Value, "65536", "bytes from 0 to 65535"),
    ("A MB P 1 l 60-0", Value, "60-0", "two like 0-60"),
    ("A MB P 2 f", Syntax, "", "write whole, first, later or piece"),
    ("A MB P 2 f middle", Value, "middle", "write whole, first, later or piece"),
    // D.
    ("D", Syntax, "", "not a MAC address"),
    ("D MB", Syntax, "", "not a filter class"),
    ("D MB #0", Value, "#0", "not a rule"),
    ("D MB 5", Syntax, "5", "not a filter class"),
    ("D MB #2 I", Syntax, "", "0 to 15"),
    ("D MB I 99", Value, "99", "0 to 15"),
    ("D MB M 5 s", Value, "s", "its bit 1 stays on in 5"),
    ("D MB I 4 t", Value, "t", "omit the key, or clear 4 in the value"),
    ("D MB T 2 d", Value, "d", "its bit 2 stays on"),
    ("D MB V 1 s", Value, "s", "its bit 1 stays on"),
    ("D MB F 1 f", Value, "f", "its bit 1 stays on"),
    ("D MB P 2 f", Value, "f", "its bit 2 stays on"),
    ("D MB M 4 s 1:2:3:4:5:6", Syntax, "1:2:3:4:5:6", "not a key"),
    ("D MB I 0 s s", Syntax, "s", "name each key once"),
    ("D MB I 0 q", Syntax, "q", "its keys are s, d, t, p"),
    // X and Q.
    ("X", Syntax, "", "not a MAC address"),
    ("X all", Value, "all", "not a MAC address"),
    ("X MB Z", Syntax, "Z", "F (firewall), L (load balancing) or A (both)"),
    ("X MB F L", Syntax, "L", "complete without it"),
    ("Q 1:2", Value, "1:2", "not a MAC address"),
    ("Q *", Value, "*", "not a MAC address"),
    ("Q MB F", Syntax, "F", "complete without it"),
    // Control characters are escaped.
    ("R F \u{1b}[31m 10.0.0.1", Value, "\u{1b}[31m", "not a MAC address"),
    ("R F MB\u{7f} 10.0.0.1", Value, "MB\u{7f}", "not a MAC address"),
];

#[test]
fn bad_commands_name_the_token_the_place_and_the_remedy() {
    assert!(BAD.len() >= 150, "{}", BAD.len());
    for &(line, code, token, words) in BAD {
        let mac = |text: &str| text.replace("MB", "2:0:0:0:0:1");
        let (line, token) = (mac(line), mac(token));
        let error = Command::parse(&line).expect_err(&line);
        assert_eq!(error.code, code, "{line}: {error}");
        assert!(error.message.contains(words), "{line}: {error}");
        let named = match token.as_str() {
            "" => "the command ends here: ".to_string(),
            token => {
                format!("'{}': ", token.chars().flat_map(char::escape_default).collect::<String>())
            }
        };
        assert!(error.message.starts_with(&named), "{line}: {error}");
        let at = error.column - 1;
        if token.is_empty() {
            assert_eq!(at, line.trim_end().len(), "{line}: {error}");
        } else {
            let here = line[at..].split_ascii_whitespace().next();
            let begins = at == 0 || line.as_bytes()[at - 1].is_ascii_whitespace();
            assert!(here == Some(&token) && begins, "{line}: column {}", error.column);
        }
        assert!(error.message.is_ascii() && !error.message.contains(char::is_control), "{error}");
        let reply = nfqd_shmctl::Reply::from(error.clone()).to_string();
        assert_eq!(reply, format!("ERR {code} column {}: {}", error.column, error.message));
        assert!(reply.parse::<nfqd_shmctl::Reply>().is_ok(), "{reply}");
    }
}

/// Every key of every class is in the table with a bad value and, unless it may stand alone,
/// without one.
#[test]
fn no_field_is_left_out() {
    for field in Class::ALL.into_iter().flat_map(Class::fields) {
        let (class, key) = (format!("A MB {} ", field.class().letter()), field.letter());
        let has = |token_is_missing: bool| {
            BAD.iter().any(|(line, _, token, _)| {
                let end =
                    if token_is_missing { format!(" {key}") } else { format!(" {key} {token}") };
                line.starts_with(&class)
                    && token.is_empty() == token_is_missing
                    && line.ends_with(&end)
            })
        };
        assert!(has(false), "{field:?} with a bad value");
        assert!(has(true) || field.has_default(), "{field:?} without a value");
    }
}
