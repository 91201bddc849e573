//! The stream on three servers: leaders change and servers die while it is published to.

use std::fmt::Write;
use std::time::Duration;

use async_nats::{Client, ConnectOptions};
use compose::process::{Child, Program};
use compose::{ports, tools};
use consistency::{Epoch, stream_name};
use event_store::{EventStore, Expected, Relay, RelayConfig};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use crate::region::{Running, assert_published, polling};
use crate::support::{Database, append, eventually, order};

/// Three servers that keep each stream three times, open to everybody on loopback.
struct Cluster {
    // Before the folder, so that the servers are gone when it is removed.
    servers: [Child; 3],
    folder: TempDir,
    client_ports: [u16; 3],
}

impl Cluster {
    fn start() -> Self {
        let folder = tempfile::Builder::new().prefix("tidemark-cluster-").tempdir().unwrap();
        let client_ports = ports::free_many().unwrap();
        let cluster_ports: [u16; 3] = ports::free_many().unwrap();
        let mut routes = String::new();
        for port in cluster_ports {
            write!(routes, "\"nats://127.0.0.1:{port}\", ").unwrap();
        }
        for (nth, (client_port, cluster_port)) in client_ports.iter().zip(cluster_ports).enumerate()
        {
            let store = folder.path().join(format!("n{nth}"));
            let config = format!(
                "server_name: n{nth}\nlisten: \"127.0.0.1:{client_port}\"\n\
                 jetstream {{ store_dir: \"{}\", max_file_store: 1GB }}\n\
                 cluster {{ name: three, listen: \"127.0.0.1:{cluster_port}\", routes: [{routes}] }}\n",
                store.display(),
            );
            std::fs::write(folder.path().join(format!("n{nth}.conf")), config).unwrap();
        }
        let servers = [0, 1, 2].map(|nth| server(&folder, nth));
        Self { servers, folder, client_ports }
    }

    async fn client(&self) -> Client {
        let urls: Vec<String> =
            self.client_ports.iter().map(|port| format!("nats://127.0.0.1:{port}")).collect();
        let options = ConnectOptions::new().retry_on_initial_connect();
        let client = options.connect(urls).await.unwrap();
        eventually("connected", async || {
            let dead = self.servers.iter().find(|server| !server.is_running());
            assert!(dead.is_none(), "{}", dead.unwrap().log_tail());
            (client.connection_state() == async_nats::connection::State::Connected).then_some(())
        })
        .await;
        client
    }

    fn start_again(&mut self, nth: usize) {
        self.servers[nth] = server(&self.folder, nth);
    }
}

fn server(folder: &TempDir, nth: usize) -> Child {
    let log = folder.path().join(format!("n{nth}.log"));
    Program::new(format!("nats n{nth}"), tools::nats_server().unwrap(), log)
        .arg("--config")
        .arg(folder.path().join(format!("n{nth}.conf")))
        .folder(folder.path())
        .spawn()
        .unwrap()
}

/// The number of the server that leads the stream.
async fn leader(client: &Client) -> usize {
    let mut context = async_nats::jetstream::new(client.clone());
    // A request that meets an election is lost.
    context.set_timeout(Duration::from_millis(500));
    eventually("the stream has a leader", async || {
        let stream = context.get_stream(stream_name(Epoch::FIRST)).await.ok()?;
        let name = stream.cached_info().cluster.clone()?.leader?;
        name.strip_prefix('n')?.parse().ok()
    })
    .await
}

async fn append_until_stopped(store: EventStore, stop: CancellationToken) {
    let mut nth = 0;
    while !stop.is_cancelled() {
        nth += 1;
        store.append(append(&order(&format!("o-{}", nth % 9)), Expected::Any, 3)).await.unwrap();
        // Keeps the log short enough to be compared with its stream.
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn last_published(running: &Running) -> u64 {
    running.relay.status().borrow().published.map_or(0, |at| at.position.get())
}

#[tokio::test]
async fn leader_changes_while_publishing_leave_the_stream_the_log() {
    let mut cluster = Cluster::start();
    let database = Database::start().await;
    let (store, _committer) = database.store().await;
    let (client, observer) = (cluster.client().await, cluster.client().await);
    let shutdown = CancellationToken::new();
    let config = RelayConfig { stream_replica_count: 3, ..polling() };
    let relay = Relay::spawn(store.clone(), client.clone(), config, shutdown.clone());
    let running = Running { relay, client, shutdown };
    let stop = CancellationToken::new();
    let appending = tokio::spawn(append_until_stopped(store.clone(), stop.clone()));
    running.until_published(10).await;

    let stepdown = format!("$JS.API.STREAM.LEADER.STEPDOWN.{}", stream_name(Epoch::FIRST));
    for _ in 0..4 {
        let before = leader(&observer).await;
        observer.request(stepdown.clone(), "".into()).await.unwrap();
        eventually("another leads", async || (leader(&observer).await != before).then_some(()))
            .await;
        running.until_published(last_published(&running) + 50).await;
    }
    let leads = leader(&observer).await;
    cluster.servers[leads].kill().await;
    running.until_published(last_published(&running) + 50).await;
    cluster.start_again(leads);
    stop.cancel();
    appending.await.unwrap();
    let context = async_nats::jetstream::new(observer);
    let messages = assert_published(&context, &database, &store).await;
    assert!(messages.len() > 300);
    running.stop().await;
}
