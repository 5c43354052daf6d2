//! A TCP proxy in front of the server, which can lose, swallow and count what goes through it.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use postgres::Config;
use postgres::config::Host;

/// Ends every request of the extended protocol.
const SYNC: &[u8] = b"S\0\0\0\x04";

#[derive(Default)]
struct Control {
    /// Nothing gets through any more, on no connection, in no direction, and nobody is told.
    is_swallowing: AtomicBool,
    /// The same for the connections up to this one.
    swallowed: AtomicUsize,
    /// The next connection is accepted, and nothing gets through on it.
    swallows_next: AtomicBool,
    /// The answer to the next request that contains this is lost: it is received, thrown away, and the connection is cut.
    cut: Mutex<Option<Vec<u8>>>,
    cuts: AtomicUsize,
    requests: AtomicUsize,
    connections: AtomicUsize,
    open: Mutex<Vec<TcpStream>>,
    /// How long an answer is held back.
    delay_millis: AtomicU64,
}

pub struct Proxy {
    pub dsn: String,
    control: Arc<Control>,
}

impl Proxy {
    pub fn to(dsn: &str) -> Proxy {
        let config: Config = dsn.parse().expect("a DSN");
        let host = match config.get_hosts() {
            [Host::Tcp(host)] => host.clone(),
            other => panic!("the proxy needs one TCP host in the DSN: {other:?}"),
        };
        let port = config.get_ports().first().copied().unwrap_or(5432);
        let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
        let own = listener.local_addr().expect("address").port();
        let password = String::from_utf8(config.get_password().unwrap_or_default().to_vec()).expect("UTF-8");
        let proxied = format!(
            "host=127.0.0.1 port={own} user={} password='{password}' dbname={}",
            config.get_user().expect("a user in the DSN"),
            config.get_dbname().expect("a database in the DSN"),
        );
        let control = Arc::new(Control::default());
        let shared = Arc::clone(&control);
        thread::spawn(move || {
            let mut swallowed = Vec::new();
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect((host.as_str(), port)) else { continue };
                shared.connections.fetch_add(1, Ordering::SeqCst);
                if shared.swallows_next.swap(false, Ordering::SeqCst) {
                    swallowed.push(client);
                    continue;
                }
                shared.open.lock().unwrap().extend([client.try_clone().unwrap(), server.try_clone().unwrap()]);
                serve(client, server, &shared);
            }
        });
        Proxy { dsn: proxied, control }
    }

    /// From now on nothing gets through, and no connection is closed either.
    pub fn swallow(&self) {
        self.control.is_swallowing.store(true, Ordering::SeqCst);
    }

    /// Lets the next request with these bytes reach the server, and loses the answer.
    pub fn lose_answer_to(&self, bytes: &[u8]) {
        *self.control.cut.lock().unwrap() = Some(bytes.to_vec());
    }

    /// From now on nothing gets through on the connections that are open, while new ones are served.
    pub fn swallow_open_connections(&self) {
        self.control.swallowed.store(self.connections(), Ordering::SeqCst);
    }

    /// The next connection is accepted, and hears nothing.
    pub fn swallow_next_connection(&self) {
        self.control.swallows_next.store(true, Ordering::SeqCst);
    }

    /// Holds every answer back for a while.
    pub fn delay_answers(&self, delay: Duration) {
        self.control.delay_millis.store(delay.as_millis().try_into().unwrap(), Ordering::SeqCst);
    }

    /// Cuts every connection, whatever the server is doing for it.
    pub fn cut(&self) {
        for socket in self.control.open.lock().unwrap().drain(..) {
            socket.shutdown(Shutdown::Both).ok();
        }
    }

    /// How many answers were lost.
    pub fn lost_answers(&self) -> usize {
        self.control.cuts.load(Ordering::SeqCst)
    }

    /// How many round trips were begun.
    pub fn requests(&self) -> usize {
        self.control.requests.load(Ordering::SeqCst)
    }

    /// How many connections were opened.
    pub fn connections(&self) -> usize {
        self.control.connections.load(Ordering::SeqCst)
    }
}

fn serve(client: TcpStream, server: TcpStream, control: &Arc<Control>) {
    let number = control.connections.load(Ordering::SeqCst);
    client.set_nodelay(true).ok();
    server.set_nodelay(true).ok();
    let is_cutting = Arc::new(AtomicBool::new(false));
    let (to_server, to_client) = (
        (client.try_clone().unwrap(), server.try_clone().unwrap(), Arc::clone(control), Arc::clone(&is_cutting)),
        (server, client, Arc::clone(control), is_cutting),
    );
    thread::spawn(move || {
        let (from, to, control, is_cutting) = to_server;
        copy(from, to, &control, number, |request| {
            if request.ends_with(SYNC) {
                control.requests.fetch_add(1, Ordering::SeqCst);
            }
            let mut cut = control.cut.lock().unwrap();
            if let Some(bytes) = &*cut
                && request.windows(bytes.len()).any(|window| window == bytes)
            {
                is_cutting.store(true, Ordering::SeqCst);
                *cut = None;
            }
            true
        });
    });
    thread::spawn(move || {
        let (from, to, control, is_cutting) = to_client;
        copy(from, to, &control, number, |_| {
            thread::sleep(Duration::from_millis(control.delay_millis.load(Ordering::SeqCst)));
            // The server answered, so that it has committed.
            let is_cut = is_cutting.load(Ordering::SeqCst);
            control.cuts.fetch_add(usize::from(is_cut), Ordering::SeqCst);
            !is_cut
        });
    });
}

/// Copies until one side ends, or `pass` says no.
fn copy(mut from: TcpStream, mut to: TcpStream, control: &Control, number: usize, pass: impl Fn(&[u8]) -> bool) {
    let is_swallowing =
        || control.is_swallowing.load(Ordering::SeqCst) || number <= control.swallowed.load(Ordering::SeqCst);
    let mut buffer = [0; 65536];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        if is_swallowing() {
            continue;
        }
        if !pass(&buffer[..length]) || to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    // A proxy that swallows tells nobody that the other side has gone.
    if !is_swallowing() {
        from.shutdown(Shutdown::Both).ok();
        to.shutdown(Shutdown::Both).ok();
    }
}
