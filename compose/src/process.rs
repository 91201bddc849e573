//! Child processes that cannot outlive their owner.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, mpsc};
use std::time::Duration;

use rustix::process::{Pid, WaitId, WaitIdOptions, kill_process, waitid};
use tokio::time::Instant;

use crate::{Error, tools};

pub use rustix::process::Signal;

/// How often a condition is looked at while it is awaited.
pub const POLL: Duration = Duration::from_millis(10);

/// How much of a log an error message repeats.
const TAIL_BYTES: u64 = 4096;

/// A process that is told to stop does so as soon as each of its threads is scheduled.
const FREEZE_DEADLINE: Duration = Duration::from_secs(10);

/// A server that dies with its owner gets this long before it is killed.
const DROP_GRACE: Duration = Duration::from_secs(3);

/// A program to start, with what becomes of it.
#[derive(Debug, Clone)]
pub struct Program {
    name: String,
    path: PathBuf,
    args: Vec<OsString>,
    env: Vec<(String, OsString)>,
    folder: Option<PathBuf>,
    user: Option<String>,
    log: PathBuf,
    end_signal: Signal,
}

impl Program {
    /// The program at `path`, called `name` in messages, writing both its outputs to the end of the file `log`.
    pub fn new(name: impl Into<String>, path: impl Into<PathBuf>, log: impl Into<PathBuf>) -> Self {
        Program {
            name: name.into(),
            path: path.into(),
            args: Vec::new(),
            env: Vec::new(),
            folder: None,
            user: None,
            log: log.into(),
            end_signal: Signal::KILL,
        }
    }

    /// What it is called in messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, name: impl Into<String>, value: impl AsRef<OsStr>) -> Self {
        self.env.push((name.into(), value.as_ref().to_owned()));
        self
    }

    /// Sets the working folder.
    #[must_use]
    pub fn folder(mut self, folder: impl Into<PathBuf>) -> Self {
        self.folder = Some(folder.into());
        self
    }

    /// Runs the program as this user; only root can.
    #[must_use]
    pub fn user(mut self, user: impl Into<String>) -> Self {
        self.user = Some(user.into());
        self
    }

    /// The signal sent when the owner drops the child or dies. `KILL` unless set; choose another for a program that
    /// has something to clean up, it is killed when it takes too long.
    #[must_use]
    pub fn end_signal(mut self, signal: Signal) -> Self {
        self.end_signal = signal;
        self
    }

    /// Starts it.
    pub fn spawn(self) -> Result<Child, Error> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(&self.log)
            .map_err(Error::io(format!("open {}", self.log.display())))?;
        let errors = log.try_clone().map_err(Error::io("share a log file"))?;
        let mut command = self.command();
        command.stdin(Stdio::null()).stdout(log).stderr(errors);
        // A group of its own: the terminal's Ctrl-C is for the owner, who stops its children in order.
        command.process_group(0);
        let what = format!("start {}", self.path.display());
        let inner = spawn_from_lasting_thread(command).map_err(Error::io(what))?;
        Ok(Child {
            pid: inner.id(),
            name: self.name,
            log: self.log,
            end_signal: self.end_signal,
            inner: Mutex::new(inner),
        })
    }

    /// `setpriv` makes the system end the child when the owner is killed, and changes the user; then it becomes the
    /// program, with the same process id.
    fn command(&self) -> Command {
        let mut command = match tools::on_path("setpriv") {
            Some(setpriv) => {
                let mut command = Command::new(setpriv);
                command.args(["--pdeathsig", signal_name(self.end_signal)]);
                if let Some(user) = &self.user {
                    command.args(["--reuid", user, "--regid", user, "--clear-groups"]);
                }
                command.arg("--").arg(&self.path);
                command
            }
            None => Command::new(&self.path),
        };
        command.args(&self.args).envs(self.env.iter().map(|(name, value)| (name, value)));
        if let Some(folder) = &self.folder {
            command.current_dir(folder);
        }
        command
    }
}

/// A running or ended child process. Ends with its owner: dropped, it is sent its end signal, killed if that does not
/// help, and waited for.
#[derive(Debug)]
pub struct Child {
    name: String,
    pid: u32,
    log: PathBuf,
    end_signal: Signal,
    inner: Mutex<std::process::Child>,
}

impl Child {
    /// The process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The name it was started under.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file both its outputs go to.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Whether it has not ended yet.
    pub fn is_running(&self) -> bool {
        self.exit_status().is_none()
    }

    /// How it ended, if it has.
    pub fn exit_status(&self) -> Option<ExitStatus> {
        self.lock().try_wait().ok().flatten()
    }

    /// Sends a signal (`TERM`, `STOP`, `CONT`, `KILL`...). Nothing happens when the process has ended.
    pub fn signal(&self, signal: Signal) {
        let mut inner = self.lock();
        // While the lock is held nobody reaps the process, so its id cannot be given to another.
        if let (Ok(None), Some(pid)) = (inner.try_wait(), self.os_pid()) {
            // It may end at this moment; then there is nothing left to signal.
            let _ = kill_process(pid, signal);
        }
    }

    /// Stops it and waits until none of its threads runs any more, which the signal alone does not. It goes on when
    /// it is sent `CONT`.
    pub async fn freeze(&self) -> Result<(), Error> {
        self.signal(Signal::STOP);
        let told = WaitIdOptions::STOPPED | WaitIdOptions::NOHANG;
        let is_frozen = async || {
            self.os_pid().is_some_and(|pid| matches!(waitid(WaitId::Pid(pid), told), Ok(Some(_))))
        };
        self.wait_until("frozen", FREEZE_DEADLINE, is_frozen).await
    }

    /// Kills it at once and waits until it is gone.
    pub async fn kill(&self) {
        self.signal(Signal::KILL);
        // A killed process is gone as soon as the kernel gets to it.
        self.ended(Duration::from_secs(10)).await;
    }

    /// Sends `signal` and waits until it has ended; kills it at the deadline and says so.
    pub async fn stop(&self, signal: Signal, deadline: Duration) -> Result<(), Error> {
        self.signal(signal);
        if self.ended(deadline).await {
            return Ok(());
        }
        self.kill().await;
        Err(self.late("stopped", deadline))
    }

    /// Waits until it has ended, `deadline` at the most. True when it has.
    pub async fn ended(&self, deadline: Duration) -> bool {
        let end = Instant::now() + deadline;
        while self.is_running() {
            if Instant::now() >= end {
                return false;
            }
            tokio::time::sleep(POLL).await;
        }
        true
    }

    /// Waits until `ready` answers true. An error when the process ends first or the deadline passes.
    pub async fn wait_until(
        &self,
        awaited: &'static str,
        deadline: Duration,
        mut ready: impl AsyncFnMut() -> bool,
    ) -> Result<(), Error> {
        let end = Instant::now() + deadline;
        loop {
            if !self.is_running() {
                let (name, log) = (self.name.clone(), self.log.clone());
                return Err(Error::Ended { name, log, tail: self.log_tail() });
            }
            match tokio::time::timeout_at(end, ready()).await {
                Ok(true) => return Ok(()),
                Ok(false) if Instant::now() < end => tokio::time::sleep(POLL).await,
                Ok(false) | Err(_) => return Err(self.late(awaited, deadline)),
            }
        }
    }

    /// The last lines of its log.
    pub fn log_tail(&self) -> String {
        tail(&self.log).unwrap_or_else(|error| format!("(no log: {error})"))
    }

    fn os_pid(&self) -> Option<Pid> {
        i32::try_from(self.pid).ok().and_then(Pid::from_raw)
    }

    fn late(&self, awaited: &'static str, deadline: Duration) -> Error {
        let (name, log) = (self.name.clone(), self.log.clone());
        Error::Deadline { name, awaited, deadline, log, tail: self.log_tail() }
    }

    fn lock(&self) -> MutexGuard<'_, std::process::Child> {
        self.inner.lock().expect("no holder of the lock can panic")
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // A stopped process acts on no signal but KILL and CONT.
        self.signal(self.end_signal);
        self.signal(Signal::CONT);
        // Counted, not timed: a test's clock may stand still.
        for _ in 0..DROP_GRACE.as_millis() {
            if !self.is_running() {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut inner = self.lock();
        // Both fail only for a process that has ended already.
        let _ = inner.kill();
        let _ = inner.wait();
    }
}

/// Runs a short program to its end, off the async threads, and returns what it wrote to its standard output.
pub async fn run(program: Program) -> Result<String, Error> {
    let mut command = program.command();
    let name = program.name;
    let what = format!("run {}", program.path.display());
    let output = tokio::task::spawn_blocking(move || command.stdin(Stdio::null()).output())
        .await
        .map_err(|error| std::io::Error::other(error.to_string()))
        .and_then(|result| result)
        .map_err(Error::io(what))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let output = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    Err(Error::Command { command: name, output })
}

type Request = (Command, mpsc::Sender<std::io::Result<std::process::Child>>);

/// The system ends a child when the *thread* that started it ends, and a test's or a runtime's thread may end long
/// before the process. So one thread, which lives as long as the process, starts them all.
fn spawn_from_lasting_thread(command: Command) -> std::io::Result<std::process::Child> {
    static SPAWNER: OnceLock<Mutex<mpsc::Sender<Request>>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (requests, queue) = mpsc::channel::<Request>();
        std::thread::spawn(move || {
            for (mut command, answer) in queue {
                // The asker waits for the answer, so it is there to receive it.
                let _ = answer.send(command.spawn());
            }
        });
        Mutex::new(requests)
    });
    let (answer, result) = mpsc::channel();
    spawner
        .lock()
        .expect("no holder of the lock can panic")
        .send((command, answer))
        .map_err(|_| std::io::Error::other("the thread that starts processes is gone"))?;
    result.recv().map_err(|_| std::io::Error::other("the thread that starts processes is gone"))?
}

/// The names `setpriv` knows the end signals by; anything else ends the child for certain.
fn signal_name(signal: Signal) -> &'static str {
    if signal == Signal::TERM {
        "TERM"
    } else if signal == Signal::INT {
        "INT"
    } else if signal == Signal::QUIT {
        "QUIT"
    } else {
        "KILL"
    }
}

fn tail(log: &Path) -> std::io::Result<String> {
    let mut file = File::open(log)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
