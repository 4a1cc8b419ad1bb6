//! A virtual machine under QEMU's software emulation, with an ivshmem device and a NIC on the
//! bridge.

use crate::netns::run;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// The memory that a virtual machine shares with its host.
pub enum Memory {
    /// A region file.
    Plain(PathBuf),
    /// What the server at this socket gives it.
    Doorbell(PathBuf),
}

impl Memory {
    fn arguments(&self) -> [String; 4] {
        match self {
            Memory::Plain(path) => [
                "-object".to_string(),
                format!(
                    "memory-backend-file,id=region,share=on,mem-path={},size=1M",
                    path.display()
                ),
                "-device".to_string(),
                "ivshmem-plain,memdev=region".to_string(),
            ],
            Memory::Doorbell(path) => [
                "-chardev".to_string(),
                format!("socket,id=region,path={}", path.display()),
                "-device".to_string(),
                "ivshmem-doorbell,chardev=region,vectors=2,master=on".to_string(),
            ],
        }
    }
}

/// A running virtual machine. It ends with this value, or after five minutes.
pub struct Vm {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    console: PathBuf,
    number: u32,
}

/// Returns the directory in which `tests/vm/prepare` put kernel and initrd, from `NFQD_TESTS_VM`.
pub fn directory() -> Option<PathBuf> {
    std::env::var_os("NFQD_TESTS_VM").map(PathBuf::from)
}

impl Vm {
    /// Boots one, with a NIC of this MAC on bridge `br0` and this address, and this memory.
    ///
    /// # Panics
    /// If it does not boot; with what its console said.
    pub fn boot(files: &Path, memory: &Memory, mac: &str, address: &str, console: &Path) -> Vm {
        run("ip tuntap add dev vm mode tap vnet_hdr");
        run("ip link set vm master br0 up");
        let mut child = Command::new("timeout")
            .args([
                "-k",
                "2",
                "300",
                "qemu-system-x86_64",
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
            ])
            .args([
                "-no-reboot",
                "-machine",
                "pc,accel=tcg",
                "-cpu",
                "max",
                "-smp",
                "1",
                "-m",
                "128",
            ])
            .arg("-kernel")
            .arg(files.join("kernel"))
            .arg("-initrd")
            .arg(files.join("initrd"))
            .args(["-append", &format!("console=ttyS0 quiet panic=-1 address={address}")])
            // The first serial port is the console, the second the command channel.
            .args(["-serial", &format!("file:{}", console.display())])
            .args(["-chardev", "stdio,id=commands,signal=off", "-serial", "chardev:commands"])
            .args(memory.arguments())
            .args(["-netdev", "tap,id=net,ifname=vm,script=no,downscript=no,vhost=off"])
            .args(["-device", &format!("virtio-net-pci,netdev=net,mac={mac},romfile=")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu");
        let input = child.stdin.take().expect("stdin");
        let output = BufReader::new(child.stdout.take().expect("stdout"));
        let mut vm = Vm { child, input, output, console: console.to_path_buf(), number: 0 };
        while vm.line() != "ready" {}
        vm
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        let len = self.output.read_line(&mut line).expect("qemu");
        let console = || std::fs::read_to_string(&self.console).unwrap_or_default();
        assert!(len != 0, "the virtual machine is gone\n{}", console());
        line.trim_end().to_string()
    }

    /// Runs a command line in the guest's shell; returns exit code and output.
    ///
    /// # Panics
    /// If the machine is gone.
    pub fn run(&mut self, command: &str) -> (i32, String) {
        assert!(!command.contains('\n'), "one line: {command}");
        self.number += 1;
        writeln!(self.input, "{} {command}", self.number).expect("qemu");
        let line = self.line();
        let words: Vec<&str> = line.split(' ').collect();
        assert_eq!(words[..2], ["answer", &self.number.to_string()], "{command}");
        let mut output = vec![0; words[3].parse().expect("length")];
        self.output.read_exact(&mut output).expect("qemu");
        (words[2].parse().expect("code"), String::from_utf8_lossy(&output).into_owned())
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = writeln!(self.input, "quit");
        let mut rest = Vec::new();
        let _ = self.output.read_to_end(&mut rest);
        let _ = self.child.wait();
        let _ = Command::new("ip").args(["link", "del", "vm"]).status();
    }
}
