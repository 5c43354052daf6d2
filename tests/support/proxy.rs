//! A TCP proxy in front of the server, which can lose, swallow, hold back and count what goes through it.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use postgres::Config;
use postgres::config::Host;

/// Ends every request of the extended protocol.
const SYNC: &[u8] = b"S\0\0\0\x04";

/// Begins a request that prepares a statement.
const PARSE: &[u8] = b"P";

/// Runs a statement, to its last row.
const EXECUTE: &[u8] = b"E\0\0\0\x09\0\0\0\0\0";

fn contains(request: &[u8], bytes: &[u8]) -> bool {
    request.windows(bytes.len()).any(|window| window == bytes)
}

#[derive(Default)]
struct Control {
    /// Nothing gets through any more, on no connection, in no direction, and nobody is told.
    is_swallowing: AtomicBool,
    /// The same for the connections up to this one.
    swallowed: AtomicUsize,
    /// The next connection is accepted, and nothing gets through on it.
    swallows_next: AtomicBool,
    /// The answer to the next request that contains this is lost: it is received, thrown away, and the connection is
    /// cut.
    cut: Mutex<Option<Vec<u8>>>,
    cuts: AtomicUsize,
    /// The answer to the next request that contains this comes so much later.
    held_back: Mutex<Option<(Vec<u8>, Duration)>>,
    /// From the answer to the next request that contains this on, its connection swallows every answer, and stays open.
    deafened: Mutex<Option<Vec<u8>>>,
    /// The next request that contains this is kept, and its connection is cut.
    kept_next: Mutex<Option<Vec<u8>>>,
    /// What was kept, and the way to the server that it would have gone.
    kept: Mutex<Vec<(TcpStream, Vec<u8>)>>,
    requests: AtomicUsize,
    connections: AtomicUsize,
    /// Both sides of each connection, by its number.
    open: Mutex<HashMap<usize, [TcpStream; 2]>>,
    to_server: Way,
    to_client: Way,
    is_closed: AtomicBool,
}

/// What happens to whatever goes in one direction.
#[derive(Default)]
struct Way {
    /// How long each piece is held back.
    delay_millis: AtomicU64,
    /// Nothing gets through for now; it comes later, unless the connection is cut before.
    is_stalled: Mutex<bool>,
    goes_on: Condvar,
}

impl Way {
    fn stalled(&self) -> MutexGuard<'_, bool> {
        self.is_stalled.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stall(&self, is_stalled: bool) {
        *self.stalled() = is_stalled;
        self.goes_on.notify_all();
    }

    fn wait(&self) {
        thread::sleep(Duration::from_millis(self.delay_millis.load(Ordering::SeqCst)));
        drop(self.goes_on.wait_while(self.stalled(), |is_stalled| *is_stalled));
    }
}

/// Closes all connections when it is dropped.
pub struct Proxy {
    pub dsn: String,
    own: SocketAddr,
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
        let own = listener.local_addr().expect("address");
        let password = String::from_utf8(config.get_password().unwrap_or_default().to_vec()).expect("UTF-8");
        let proxied = format!(
            "host=127.0.0.1 port={} user={} password='{password}' dbname={}",
            own.port(),
            config.get_user().expect("a user in the DSN"),
            config.get_dbname().expect("a database in the DSN"),
        );
        let control = Arc::new(Control::default());
        let shared = Arc::clone(&control);
        thread::spawn(move || {
            let mut swallowed = Vec::new();
            for client in listener.incoming().flatten() {
                if shared.is_closed.load(Ordering::SeqCst) {
                    break;
                }
                let Ok(server) = TcpStream::connect((host.as_str(), port)) else { continue };
                shared.connections.fetch_add(1, Ordering::SeqCst);
                if shared.swallows_next.swap(false, Ordering::SeqCst) {
                    swallowed.push(client);
                    continue;
                }
                serve(client, server, &shared);
            }
        });
        Proxy { dsn: proxied, own, control }
    }

    /// From now on nothing gets through, and no connection is closed either.
    pub fn swallow(&self) {
        self.control.is_swallowing.store(true, Ordering::SeqCst);
    }

    /// Lets the next request with these bytes reach the server, and loses the answer.
    pub fn lose_answer_to(&self, bytes: &[u8]) {
        *self.control.cut.lock().unwrap() = Some(bytes.to_vec());
    }

    /// Forgets what [`lose_answer_to`](Self::lose_answer_to) was told, if it hasn't come to it.
    pub fn lose_no_answer(&self) {
        *self.control.cut.lock().unwrap() = None;
    }

    /// Holds the answer to the next request with these bytes back.
    pub fn hold_back_answer_to(&self, bytes: &[u8], delay: Duration) {
        *self.control.held_back.lock().unwrap() = Some((bytes.to_vec(), delay));
    }

    /// Forgets what [`hold_back_answer_to`](Self::hold_back_answer_to) was told, if it hasn't come to it.
    pub fn hold_back_no_answer(&self) {
        *self.control.held_back.lock().unwrap() = None;
    }

    /// Lets the next request with these bytes reach the server. Its connection stays open, and hears nothing from
    /// then on.
    pub fn swallow_answers_after(&self, bytes: &[u8]) {
        *self.control.deafened.lock().unwrap() = Some(bytes.to_vec());
    }

    /// Forgets what [`swallow_answers_after`](Self::swallow_answers_after) was told, if it hasn't come to it.
    pub fn swallow_no_answers(&self) {
        *self.control.deafened.lock().unwrap() = None;
    }

    /// Whether [`swallow_answers_after`](Self::swallow_answers_after) has come to its request.
    pub fn has_swallowed(&self) -> bool {
        self.control.deafened.lock().unwrap().is_none()
    }

    /// Keeps the next request with these bytes on its way, for [`deliver`](Self::deliver), and cuts its connection.
    pub fn keep_request(&self, bytes: &[u8]) {
        *self.control.kept_next.lock().unwrap() = Some(bytes.to_vec());
    }

    /// Forgets what [`keep_request`](Self::keep_request) was told, if it hasn't come to it.
    pub fn keep_no_request(&self) {
        *self.control.kept_next.lock().unwrap() = None;
    }

    /// How many requests are kept.
    pub fn kept_requests(&self) -> usize {
        self.control.kept.lock().unwrap().len()
    }

    /// Lets the server have what was kept, now. Nobody hears its answers.
    pub fn deliver(&self) {
        for (mut server, request) in self.control.kept.lock().unwrap().drain(..) {
            server.write_all(&request).ok();
            // The server reads what it was sent, and notices the end after it.
            server.shutdown(Shutdown::Write).ok();
        }
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
        self.control.to_client.delay_millis.store(delay.as_millis().try_into().unwrap(), Ordering::SeqCst);
    }

    /// Holds every request back for a while.
    pub fn delay_requests(&self, delay: Duration) {
        self.control.to_server.delay_millis.store(delay.as_millis().try_into().unwrap(), Ordering::SeqCst);
    }

    /// Lets no request, or no answer, through until it is told otherwise; then what was sent meanwhile comes.
    pub fn stall(&self, requests: bool, answers: bool) {
        self.control.to_server.stall(requests);
        self.control.to_client.stall(answers);
    }

    /// Cuts every connection, whatever the server is doing for it.
    pub fn cut(&self) {
        for (_, sockets) in self.control.open.lock().unwrap().drain() {
            for socket in sockets {
                socket.shutdown(Shutdown::Both).ok();
            }
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

    /// Waits until nobody has asked anything for a moment: what is done while nobody waits has been done.
    pub fn becomes_quiet(&self) {
        let (mut requests, mut since) = (self.requests(), Instant::now());
        while since.elapsed() < Duration::from_millis(200) {
            thread::sleep(Duration::from_millis(5));
            if self.requests() != requests {
                (requests, since) = (self.requests(), Instant::now());
            }
        }
    }

    /// How many connections were opened.
    pub fn connections(&self) -> usize {
        self.control.connections.load(Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.control.is_closed.store(true, Ordering::SeqCst);
        // Wakes the thread that accepts.
        TcpStream::connect(self.own).ok();
        self.cut();
        self.control.kept.lock().unwrap().clear();
        self.stall(false, false);
    }
}

/// What happens to the next answer on a connection.
#[derive(Default)]
struct Answer {
    /// It is thrown away, and the connection is cut.
    is_lost: AtomicBool,
    /// It is thrown away, and so is everything after it.
    is_swallowed: AtomicBool,
    delay_millis: AtomicU64,
}

fn serve(client: TcpStream, server: TcpStream, control: &Arc<Control>) {
    let number = control.connections.load(Ordering::SeqCst);
    control.open.lock().unwrap().insert(number, [client.try_clone().unwrap(), server.try_clone().unwrap()]);
    client.set_nodelay(true).ok();
    server.set_nodelay(true).ok();
    let answer = Arc::new(Answer::default());
    let (to_server, to_client) = (
        (client.try_clone().unwrap(), server.try_clone().unwrap(), Arc::clone(control), Arc::clone(&answer)),
        (server, client, Arc::clone(control), answer),
    );
    thread::spawn(move || {
        let (from, to, control, answer) = to_server;
        let server = to.try_clone().unwrap();
        copy(from, to, &control, number, |request| {
            control.to_server.wait();
            if request.ends_with(SYNC) {
                control.requests.fetch_add(1, Ordering::SeqCst);
            }
            // A statement that is only prepared has the text in it, and does nothing: what is waited for comes later.
            let is_prepared_only = request.starts_with(PARSE) && !contains(request, EXECUTE);
            let is_in = |bytes: &Vec<u8>| !is_prepared_only && contains(request, bytes);
            if control.cut.lock().unwrap().take_if(|bytes| is_in(bytes)).is_some() {
                answer.is_lost.store(true, Ordering::SeqCst);
            }
            if let Some((_, delay)) = control.held_back.lock().unwrap().take_if(|(bytes, _)| is_in(bytes)) {
                answer.delay_millis.store(delay.as_millis().try_into().unwrap(), Ordering::SeqCst);
            }
            if control.deafened.lock().unwrap().take_if(|bytes| is_in(bytes)).is_some() {
                answer.is_swallowed.store(true, Ordering::SeqCst);
            }
            if control.kept_next.lock().unwrap().take_if(|bytes| is_in(bytes)).is_some() {
                control.kept.lock().unwrap().push((server.try_clone().unwrap(), request.to_vec()));
                return Pass::Keep;
            }
            Pass::On
        });
    });
    thread::spawn(move || {
        let (from, to, control, answer) = to_client;
        copy(from, to, &control, number, |_| {
            thread::sleep(Duration::from_millis(answer.delay_millis.swap(0, Ordering::SeqCst)));
            control.to_client.wait();
            // The server answered, so that it has committed.
            let is_lost = answer.is_lost.load(Ordering::SeqCst);
            control.cuts.fetch_add(usize::from(is_lost), Ordering::SeqCst);
            match (is_lost, answer.is_swallowed.load(Ordering::SeqCst)) {
                (true, _) => Pass::Cut,
                (false, true) => Pass::Swallow,
                (false, false) => Pass::On,
            }
        });
    });
}

/// What becomes of a piece of what goes through.
enum Pass {
    On,
    Swallow,
    /// The connection ends.
    Cut,
    /// The client's side ends, and the server's stays open.
    Keep,
}

/// Copies until one side ends, or `pass` says so.
fn copy(mut from: TcpStream, mut to: TcpStream, control: &Control, number: usize, pass: impl Fn(&[u8]) -> Pass) {
    let is_swallowing =
        || control.is_swallowing.load(Ordering::SeqCst) || number <= control.swallowed.load(Ordering::SeqCst);
    let mut buffer = [0; 65536];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        if is_swallowing() {
            continue;
        }
        match pass(&buffer[..length]) {
            Pass::On if to.write_all(&buffer[..length]).is_ok() => {}
            Pass::Swallow => {}
            Pass::Keep => {
                control.open.lock().unwrap().remove(&number);
                from.shutdown(Shutdown::Both).ok();
                return;
            }
            Pass::On | Pass::Cut => break,
        }
    }
    // A proxy that swallows tells nobody that the other side has gone.
    if !is_swallowing() {
        control.open.lock().unwrap().remove(&number);
        from.shutdown(Shutdown::Both).ok();
        to.shutdown(Shutdown::Both).ok();
    }
}
