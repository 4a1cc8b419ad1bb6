//! UDP servers and clients, one datagram a question.

use crate::netns::Host;
use crate::topology::VM;
use std::net::UdpSocket;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// A UDP server that answers with its name.
pub struct Echo {
    stop: mpsc::Sender<()>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Echo {
    /// Starts one on a host.
    ///
    /// # Panics
    /// If the port is taken.
    pub fn start(host: &Host, name: u8, port: u16) -> Echo {
        let socket = host.enter(|| UdpSocket::bind(("0.0.0.0", port)).unwrap());
        socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let (stop, stopped) = mpsc::channel();
        let thread = thread::spawn(move || {
            let mut buffer = [0; 64];
            while stopped.try_recv().is_err() {
                if let Ok((_, from)) = socket.recv_from(&mut buffer) {
                    let _ = socket.send_to(&[name], from);
                }
            }
        });
        Echo { stop, thread: Some(thread) }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        let _ = self.stop.send(());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A UDP client that always uses one port.
pub struct Asker(UdpSocket);

impl Asker {
    /// A client on a host with this port, of a port of the middlebox.
    ///
    /// # Panics
    /// If the port is taken.
    pub fn new(host: &Host, port: u16, to: u16) -> Asker {
        let socket = host.enter(|| UdpSocket::bind(("0.0.0.0", port)).unwrap());
        socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        socket.connect((VM, to)).unwrap();
        Asker(socket)
    }

    /// Sends a datagram; returns the name of the server that answers in time.
    pub fn ask(&self) -> Option<u8> {
        let mut answer = [0];
        self.0.send(b"?").ok()?;
        self.0.recv(&mut answer).ok().map(|_| answer[0])
    }
}
