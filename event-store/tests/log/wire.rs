//! A connection to Postgres that can be broken at a chosen moment.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use consistency::Epoch;
use event_store::{Committer, EventStore, Expected, StoreConfig};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::support::{Database, LOG_ID, append, fill, is_conflict, order, pool, version};

/// What happens to what a client sends from now on, over connections made before now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    None,
    /// It is delivered; the client is cut off when the answer comes.
    LoseAnswer,
    /// The client is cut off at once; it is delivered when the wire is told to.
    Delay,
}

/// Forwards a loopback port to a server. Ends with the value.
pub struct Wire {
    port: u16,
    state: Arc<State>,
    _tasks: JoinSet<()>,
}

struct State {
    fault: Mutex<Fault>,
    /// Connections numbered below this one suffer the fault.
    fault_below: AtomicUsize,
    connection_count: AtomicUsize,
    refuses: watch::Sender<bool>,
    deliver: watch::Sender<bool>,
    /// What the server answered to what was delivered late.
    late_answer: Mutex<Vec<u8>>,
}

impl Wire {
    pub async fn to(server_port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = Arc::new(State {
            fault: Mutex::new(Fault::None),
            fault_below: AtomicUsize::new(0),
            connection_count: AtomicUsize::new(0),
            refuses: watch::Sender::new(false),
            deliver: watch::Sender::new(false),
            late_answer: Mutex::new(Vec::new()),
        });
        let mut tasks = JoinSet::new();
        let accepting = Arc::clone(&state);
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                if !*accepting.refuses.borrow() {
                    let number = accepting.connection_count.fetch_add(1, Ordering::SeqCst);
                    let state = Arc::clone(&accepting);
                    connections.spawn(async move {
                        // A server that is down closes the connection to its client.
                        if let Ok(server) = TcpStream::connect(("127.0.0.1", server_port)).await {
                            state.forward(number, client, server).await;
                        }
                    });
                }
            }
        });
        Self { port, state, _tasks: tasks }
    }

    pub fn url(&self, database: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{database}?sslmode=disable", self.port)
    }

    pub fn break_connections(&self, fault: Fault) {
        let below = self.state.connection_count.load(Ordering::SeqCst);
        self.state.fault_below.store(below, Ordering::SeqCst);
        *self.state.fault.lock().unwrap() = fault;
    }

    /// New connections are closed at once.
    pub fn refuse(&self, refuses: bool) {
        self.state.refuses.send_replace(refuses);
    }

    /// Delivers what was delayed.
    pub fn deliver(&self) {
        self.state.deliver.send_replace(true);
    }

    pub fn late_answer(&self) -> String {
        String::from_utf8_lossy(&self.state.late_answer.lock().unwrap()).into_owned()
    }
}

impl State {
    fn fault(&self, number: usize) -> Fault {
        let suffers = number < self.fault_below.load(Ordering::SeqCst);
        if suffers { *self.fault.lock().unwrap() } else { Fault::None }
    }

    async fn forward(&self, number: usize, mut client: TcpStream, mut server: TcpStream) {
        let (mut from_client, mut from_server) = (vec![0; 65536], vec![0; 65536]);
        loop {
            tokio::select! {
                read = client.read(&mut from_client) => {
                    let Some(sent) = some_bytes(read, &from_client) else { return };
                    match self.fault(number) {
                        Fault::None => server.write_all(sent).await.unwrap(),
                        Fault::LoseAnswer => {
                            server.write_all(sent).await.unwrap();
                            // Answered is committed.
                            let _ = server.read(&mut from_server).await;
                            return;
                        }
                        Fault::Delay => {
                            drop(client);
                            return self.deliver_late(server, sent).await;
                        }
                    }
                }
                read = server.read(&mut from_server) => {
                    let Some(answer) = some_bytes(read, &from_server) else { return };
                    if client.write_all(answer).await.is_err() {
                        return;
                    }
                }
            }
        }
    }

    async fn deliver_late(&self, mut server: TcpStream, sent: &[u8]) {
        self.deliver.subscribe().wait_for(|deliver| *deliver).await.unwrap();
        server.write_all(sent).await.unwrap();
        let mut answer = vec![0; 65536];
        let length = server.read(&mut answer).await.unwrap();
        answer.truncate(length);
        self.late_answer.lock().unwrap().extend(answer);
    }
}

fn some_bytes(read: std::io::Result<usize>, buffer: &[u8]) -> Option<&[u8]> {
    read.ok().filter(|length| *length > 0).map(|length| &buffer[..length])
}

/// A store over a wire.
pub struct Broken {
    pub database: Database,
    pub wire: Wire,
    pub store: EventStore,
    _committer: Committer,
}

/// A store that reaches its database over a wire, with one event in the log.
pub async fn over_a_wire() -> Broken {
    let database = Database::alone().await;
    let wire = Wire::to(database.cluster.port()).await;
    let config =
        StoreConfig { settle_wait_max: Duration::from_secs(2), ..StoreConfig::new(LOG_ID) };
    let pool = pool(&wire.url("tidemark_log"));
    let (store, committer) = EventStore::open(pool, config).await.unwrap();
    // Its statements are prepared when the wire breaks: that of an append by itself and those of the functions, for
    // commands of one event and for others.
    for event_count in [1, 2] {
        let missing = Expected::Last { epoch: Epoch::FIRST, version: version(1) };
        let lost = store.append(append(&order("a"), missing, event_count));
        assert!(is_conflict(&lost.await));
    }
    fill(&store, 1).await;
    Broken { database, wire, store, _committer: committer }
}
