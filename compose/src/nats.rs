//! NATS servers in temporary folders, and the configuration of the topology's three.

pub mod config;
mod topology;

use std::path::PathBuf;
use std::time::Duration;

use crate::folder::Folder;
use crate::process::{Child, Program, Signal};
use crate::{Error, ports, tools};

pub use config::{Config, Role, Secret, Tls, User};
pub use topology::{Topology, event_link};

const START_DEADLINE: Duration = Duration::from_secs(30);
const STOP_DEADLINE: Duration = Duration::from_secs(20);

/// One NATS server with JetStream and its store, on loopback ports. Ends and is deleted when dropped.
#[derive(Debug)]
pub struct Server {
    // Before the folder, so that the server is gone when the folder is removed.
    process: Option<Child>,
    folder: Folder,
    config: Config,
    http: reqwest::Client,
}

impl Server {
    /// A primary on its own, called `us-east` (its JetStream domain too), with the users of the topology and, for
    /// tests that cause faults, [`User::Operator`], who may do everything.
    pub async fn start_single() -> Result<Self, Error> {
        Server::start_single_over(None).await
    }

    /// The same, over TLS if there is any.
    pub async fn start_single_over(tls: Option<Tls>) -> Result<Self, Error> {
        let role = Role::Primary { leafnode_port: ports::free()?, regions: Vec::new() };
        let mut config = Config::local("us-east", role)?;
        config.operator = true;
        config.tls = tls;
        Server::start(config).await
    }

    /// Starts a server; `config.store` is set to a folder of its own.
    pub async fn start(mut config: Config) -> Result<Self, Error> {
        let folder = Folder::create("nats")?;
        config.store = folder.path().join("store");
        let mut server = Server { process: None, folder, config, http: reqwest::Client::new() };
        server.start_again().await?;
        Ok(server)
    }

    /// The URL clients connect to. Credentials go beside it: `async-nats` ignores those within a URL.
    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.config.client_port)
    }

    /// Name and password of a user.
    pub fn credentials(&self, user: User) -> (String, String) {
        let name = user.to_string();
        let password = self.config.secret.password(&name);
        (name, password)
    }

    /// The URL of the monitoring endpoints (`/varz`, `/jsz`, `/leafz`...).
    pub fn monitor_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.config.monitor_port)
    }

    /// How many streams it has, as its monitoring tells; none when it does not answer.
    pub async fn stream_count(&self) -> u64 {
        let url = format!("{}/jsz", self.monitor_url());
        let Ok(answer) = self.http.get(url).send().await else { return 0 };
        let told = answer.json::<serde_json::Value>().await.unwrap_or_default();
        told["streams"].as_u64().unwrap_or_default()
    }

    /// The configuration it was started with.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Child::pid)
    }

    /// The server's log file.
    pub fn log(&self) -> PathBuf {
        self.folder.path().join("nats.log")
    }

    /// Starts the stopped or killed server on its store and ports, and waits until JetStream is ready.
    pub async fn start_again(&mut self) -> Result<(), Error> {
        if self.process.as_ref().is_some_and(Child::is_running) {
            return Err(self.in_state("running"));
        }
        let file = self.folder.path().join("nats.conf");
        std::fs::write(&file, self.config.to_string())
            .map_err(Error::io(format!("write {}", file.display())))?;
        let name = format!("nats {}", self.config.region);
        let process = Program::new(name, tools::nats_server()?, self.log())
            .arg("--config")
            .arg(&file)
            .folder(self.folder.path())
            .spawn()?;
        let health = format!("{}/healthz?js-enabled-only=true", self.monitor_url());
        process
            .wait_until("ready", START_DEADLINE, async || {
                self.http.get(&health).send().await.is_ok_and(|answer| answer.status().is_success())
            })
            .await?;
        self.process = Some(process);
        Ok(())
    }

    /// Bounds messages from the next start on.
    pub fn limit_payload(&mut self, bytes: usize) {
        self.config.payload_bytes_max = Some(bytes);
    }

    /// Stops the server in order. The store is kept.
    pub async fn stop(&mut self) -> Result<(), Error> {
        match self.process.take() {
            Some(process) => process.stop(Signal::TERM, STOP_DEADLINE).await,
            None => Err(self.in_state("not running")),
        }
    }

    /// Kills the server at once. The store is kept as it is.
    pub async fn kill(&mut self) -> Result<(), Error> {
        let process = self.process.take().ok_or_else(|| self.in_state("not running"))?;
        process.kill().await;
        Ok(())
    }

    /// Sends a signal to the running server: `STOP` freezes it, `CONT` lets it go on.
    pub fn signal(&self, signal: Signal) {
        if let Some(process) = &self.process {
            process.signal(signal);
        }
    }

    /// Deletes the store of the stopped server: every stream is gone at the next start.
    pub async fn wipe(&mut self) -> Result<(), Error> {
        if self.process.is_some() {
            return Err(self.in_state("running"));
        }
        let store = &self.config.store;
        tokio::fs::remove_dir_all(store)
            .await
            .map_err(Error::io(format!("remove {}", store.display())))
    }

    fn in_state(&self, state: &'static str) -> Error {
        Error::State { name: format!("nats {}", self.config.region), state }
    }
}
