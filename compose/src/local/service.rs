//! A gateway or a projector as a process that can be stopped and started again.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::Error;
use crate::process::{Child, Program, Signal};

/// Longer than the services' own grace period.
const STOP_DEADLINE: Duration = Duration::from_secs(20);

/// One of our own services.
#[derive(Debug)]
pub struct Service {
    program: Program,
    child: Option<Child>,
    admin_port: u16,
}

impl Service {
    pub(super) fn start(program: Program, admin_port: u16) -> Result<Self, Error> {
        let child = Some(program.clone().spawn()?);
        Ok(Service { program, child, admin_port })
    }

    /// The admin listener's URL.
    pub fn admin_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.admin_port)
    }

    /// The process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::pid)
    }

    /// Starts it again with the same configuration. Nothing happens while it runs.
    pub fn start_again(&mut self) -> Result<(), Error> {
        if !self.child.as_ref().is_some_and(Child::is_running) {
            self.child = Some(self.program.clone().spawn()?);
        }
        Ok(())
    }

    /// Asks it to end, and kills it when it takes too long.
    pub async fn stop(&mut self) -> Result<(), Error> {
        match self.child.take() {
            Some(child) => child.stop(Signal::TERM, STOP_DEADLINE).await,
            None => Ok(()),
        }
    }

    /// Kills it at once.
    pub async fn kill(&mut self) {
        if let Some(child) = self.child.take() {
            child.kill().await;
        }
    }

    /// Sends a signal to the process: `STOP` freezes it, `CONT` lets it go on.
    pub fn signal(&self, signal: Signal) {
        if let Some(child) = &self.child {
            child.signal(signal);
        }
    }

    /// Waits until it says that it is ready.
    pub async fn wait_until_ready(
        &self,
        http: &reqwest::Client,
        deadline: Duration,
    ) -> Result<(), Error> {
        let url = format!("{}/readyz", self.admin_url());
        let ready =
            async || http.get(&url).send().await.is_ok_and(|answer| answer.status().is_success());
        self.wait_until("ready", deadline, ready).await
    }

    /// Waits until a condition holds that it is to bring about. An error when it ends first or the deadline passes.
    pub async fn wait_until(
        &self,
        awaited: &'static str,
        deadline: Duration,
        condition: impl AsyncFnMut() -> bool,
    ) -> Result<(), Error> {
        let Some(child) = &self.child else {
            let name = self.program.name().to_owned();
            return Err(Error::State { name, state: "not running" });
        };
        child.wait_until(awaited, deadline, condition).await
    }

    /// What is to be said when it has ended without being asked to.
    pub(super) fn fallen(&self) -> Option<String> {
        let child = self.child.as_ref()?;
        let status = child.exit_status()?;
        Some(format!("{} ended ({status}):\n{}", child.name(), child.log_tail()))
    }
}

/// Where Cargo puts binaries: beside the running one, or above it when that is a test.
pub(super) fn binaries() -> Result<PathBuf, Error> {
    let own = std::env::current_exe().map_err(Error::io("find the running program"))?;
    let folder = own.parent().unwrap_or(Path::new("."));
    Ok(if folder.ends_with("deps") { folder.join("..") } else { folder.to_path_buf() })
}

pub(super) fn binary(folder: &Path, name: &str) -> Result<PathBuf, Error> {
    let path = folder.join(name);
    if path.is_file() { Ok(path) } else { Err(Error::NotBuilt { path }) }
}
