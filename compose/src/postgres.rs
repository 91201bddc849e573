//! Postgres clusters in temporary folders.

use std::fs::{File, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use rustix::process::{Pid, kill_process};
use tokio::time::Instant;

use crate::folder::Folder;
use crate::process::{Child, POLL, Program, Signal, run};
use crate::{Error, ports, tools};

/// The superuser of every cluster started here, and the system user a root process drops to.
const USER: &str = "postgres";
const START_DEADLINE: Duration = Duration::from_secs(60);
const STOP_DEADLINE: Duration = Duration::from_secs(30);

/// How a cluster runs.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Whether commits reach the disk before they are acknowledged. Off for tests: what they kill is the server, not
    /// the machine.
    pub durable: bool,
    /// The port; a free one unless set.
    pub port: Option<u16>,
    /// Whether connections must be encrypted, with this certificate.
    pub tls: Option<Tls>,
    /// Further settings by name, which win over those made here.
    pub settings: Vec<(String, String)>,
}

/// The certificate of a server.
#[derive(Debug, Clone)]
pub struct Tls {
    /// In PEM.
    pub certificate: String,
    /// Its key, in PEM.
    pub key: String,
}

/// A Postgres server with its data, on a loopback port, for one holder or shared by several of this process. Trusts every
/// connection. Ends and is deleted when its last holder drops it.
#[derive(Debug)]
pub struct Cluster {
    held: Held,
}

#[derive(Debug)]
enum Held {
    Own(Box<Instance>),
    Shared {
        instance: Arc<Instance>,
        /// Tells this holder's databases from those of others.
        number: u64,
    },
}

#[derive(Debug)]
struct Instance {
    // Before the folder, so that the server is gone when the folder is removed.
    server: Option<Child>,
    folder: Folder,
    account: Option<Account>,
    bin: PathBuf,
    port: u16,
    options: Options,
}

/// An older state of a cluster's data, kept aside to be put back.
#[derive(Debug)]
pub struct DataCopy {
    folder: Folder,
}

/// Enough for the pools of all tests that run at once.
const SHARED_CONNECTIONS_MAX: &str = "1000";

/// What [`Cluster::shared`] hands out, while anybody holds it.
static SHARED: tokio::sync::Mutex<Weak<Instance>> = tokio::sync::Mutex::const_new(Weak::new());

impl Cluster {
    /// Creates a cluster and starts it.
    pub async fn start(options: Options) -> Result<Self, Error> {
        let instance = Instance::start(options).await?;
        Ok(Cluster { held: Held::Own(Box::new(instance)) })
    }

    /// Joins the cluster that others of this process hold, or starts one. Its databases are its holder's own; it is
    /// for tests that neither stop nor break their server, since starting one takes longer than most of what is tested.
    pub async fn shared() -> Result<Self, Error> {
        static JOINED: AtomicU64 = AtomicU64::new(1);
        let number = JOINED.fetch_add(1, Ordering::Relaxed);
        let mut shared = SHARED.lock().await;
        if let Some(instance) = shared.upgrade() {
            return Ok(Cluster { held: Held::Shared { instance, number } });
        }
        let settings = vec![("max_connections".to_owned(), SHARED_CONNECTIONS_MAX.to_owned())];
        let options = Options { settings, ..Options::default() };
        let instance = Arc::new(Instance::start(options).await?);
        *shared = Arc::downgrade(&instance);
        Ok(Cluster { held: Held::Shared { instance, number } })
    }

    /// The connection URL of a database of this holder, for the superuser.
    pub fn url(&self, database: &str) -> String {
        self.instance().url(&self.name(database))
    }

    /// The port, the same through every restart.
    pub fn port(&self) -> u16 {
        self.instance().port
    }

    /// The process id of the server, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.instance().server.as_ref().map(Child::pid)
    }

    /// The server's log file.
    pub fn log(&self) -> PathBuf {
        self.instance().log()
    }

    /// Creates an empty database and returns its URL.
    pub async fn create_database(&self, name: &str) -> Result<String, Error> {
        self.instance().create_database(&self.name(name)).await
    }

    /// Runs the statements of a file in a database, and stops at the first error.
    pub async fn run_file(&self, database: &str, file: &Path) -> Result<(), Error> {
        self.instance().run_file(&self.name(database), file).await
    }

    /// Starts the stopped or killed server on its data and port, and waits until it takes connections.
    pub async fn start_again(&mut self) -> Result<(), Error> {
        self.own()?.start_again().await
    }

    /// Stops the server in order: sessions are ended, what was committed is kept.
    pub async fn stop(&mut self) -> Result<(), Error> {
        self.own()?.stop().await
    }

    /// Kills the server and its sessions at once, as a crash of the machine would.
    pub async fn kill(&mut self) -> Result<(), Error> {
        self.own()?.kill().await
    }

    /// Stops or resumes the server's main process, which takes new connections; sessions go on.
    pub fn signal(&mut self, signal: Signal) -> Result<(), Error> {
        if let Some(server) = &self.own()?.server {
            server.signal(signal);
        }
        Ok(())
    }

    /// Copies the data as they are now, to be put back by [`Cluster::restore`]. Restarts the server.
    pub async fn copy_data(&mut self) -> Result<DataCopy, Error> {
        self.own()?.copy_data().await
    }

    /// Puts an older copy of the data back, as a restore from a backup would: all later commits are lost. The server
    /// may run or not; it runs afterwards.
    pub async fn restore(&mut self, older: &DataCopy) -> Result<(), Error> {
        self.own()?.restore(older).await
    }

    fn instance(&self) -> &Instance {
        match &self.held {
            Held::Own(instance) => instance,
            Held::Shared { instance, .. } => instance,
        }
    }

    /// To do to it what others would not survive.
    fn own(&mut self) -> Result<&mut Instance, Error> {
        match &mut self.held {
            Held::Own(instance) => Ok(instance),
            Held::Shared { instance, .. } => Err(instance.in_state("shared with others")),
        }
    }

    fn name(&self, database: &str) -> String {
        match &self.held {
            Held::Own(_) => database.to_owned(),
            Held::Shared { number, .. } => format!("{database}_{number}"),
        }
    }
}

impl Instance {
    async fn start(options: Options) -> Result<Self, Error> {
        let bin = tools::postgres_bin()?;
        let account = Account::to_drop_to()?;
        let folder = server_folder(account)?;
        let template = template(&bin, account).await?;
        copy(&template, &folder.path().join("data")).await?;
        let port = options.port.map_or_else(ports::free, Ok)?;
        let mut options = options;
        if let Some(tls) = &options.tls {
            let settings = encrypted(folder.path(), account, tls)?;
            options.settings.splice(0..0, settings);
        }
        let mut instance = Instance { server: None, folder, account, bin, port, options };
        instance.start_again().await?;
        Ok(instance)
    }

    fn url(&self, database: &str) -> String {
        format!("postgres://{USER}@127.0.0.1:{}/{database}", self.port)
    }

    fn log(&self) -> PathBuf {
        self.folder.path().join("postgres.log")
    }

    async fn create_database(&self, name: &str) -> Result<String, Error> {
        let createdb = Program::new("createdb", self.bin.join("createdb"), self.log())
            .args(["--host=127.0.0.1", "--username", USER, "--template=template0", "--port"])
            .args([&self.port.to_string(), name]);
        run(createdb).await?;
        Ok(self.url(name))
    }

    async fn run_file(&self, database: &str, file: &Path) -> Result<(), Error> {
        let psql = Program::new("psql", self.bin.join("psql"), self.log())
            .args(["--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1"])
            .args(["--dbname", &self.url(database), "--file"])
            .arg(file);
        run(psql).await.map(|_| ())
    }

    async fn start_again(&mut self) -> Result<(), Error> {
        if self.server.as_ref().is_some_and(Child::is_running) {
            return Err(self.in_state("running"));
        }
        let end = Instant::now() + START_DEADLINE;
        loop {
            let server = self.program().spawn()?;
            let pid_file = self.data().join("postmaster.pid");
            let pid = server.pid();
            let started = server
                .wait_until("ready", START_DEADLINE, async || says_ready(&pid_file, pid))
                .await;
            match started {
                Ok(()) => {
                    self.server = Some(server);
                    return Ok(());
                }
                // The sessions of a killed server hold on to its memory until they notice.
                Err(Error::Ended { tail, .. })
                    if tail.contains("pre-existing shared memory block")
                        && Instant::now() < end =>
                {
                    tokio::time::sleep(POLL).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn stop(&mut self) -> Result<(), Error> {
        match self.server.take() {
            Some(server) => server.stop(Signal::INT, STOP_DEADLINE).await,
            None => Err(self.in_state("not running")),
        }
    }

    async fn kill(&mut self) -> Result<(), Error> {
        let server = self.server.take().ok_or_else(|| self.in_state("not running"))?;
        let sessions = children(server.pid());
        server.kill().await;
        for session in sessions {
            // Most have noticed that the server is gone, and left.
            let _ = kill_process(session, Signal::KILL);
        }
        Ok(())
    }

    async fn copy_data(&mut self) -> Result<DataCopy, Error> {
        self.stop().await?;
        let folder = server_folder(self.account)?;
        copy(&self.data(), &folder.path().join("data")).await?;
        self.start_again().await?;
        Ok(DataCopy { folder })
    }

    async fn restore(&mut self, older: &DataCopy) -> Result<(), Error> {
        if self.server.is_some() {
            self.kill().await?;
        }
        let data = self.data();
        tokio::fs::remove_dir_all(&data)
            .await
            .map_err(Error::io(format!("remove {}", data.display())))?;
        copy(&older.folder.path().join("data"), &data).await?;
        self.start_again().await
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    fn in_state(&self, state: &'static str) -> Error {
        Error::State { name: format!("postgres on port {}", self.port), state }
    }

    fn program(&self) -> Program {
        let durable = if self.options.durable { "on" } else { "off" };
        let port = self.port.to_string();
        let settings = [
            ("listen_addresses", "127.0.0.1"),
            ("port", &port),
            // TCP on loopback is all that is used, and a socket's path is limited to 107 bytes.
            ("unix_socket_directories", ""),
            ("max_connections", "200"),
            ("shared_buffers", "16MB"),
            ("fsync", durable),
            ("full_page_writes", durable),
            ("timezone", "UTC"),
            ("log_timezone", "UTC"),
        ];
        let ours = settings.into_iter().map(|(name, value)| format!("{name}={value}"));
        let theirs = self.options.settings.iter().map(|(name, value)| format!("{name}={value}"));
        let name = format!("postgres on port {}", self.port);
        // QUIT ends the sessions with the server and frees its shared memory; KILL would do neither.
        let program = Program::new(name, self.bin.join("postgres"), self.log())
            .arg("-D")
            .arg(self.data())
            .args(ours.chain(theirs).flat_map(|setting| ["-c".to_owned(), setting]))
            .folder(self.folder.path())
            .end_signal(Signal::QUIT);
        as_account(program, self.account)
    }
}

/// The system account the server runs under when this process is root, which Postgres refuses to be.
#[derive(Debug, Clone, Copy)]
struct Account {
    user_id: u32,
    group_id: u32,
}

impl Account {
    fn to_drop_to() -> Result<Option<Account>, Error> {
        if !rustix::process::geteuid().is_root() {
            return Ok(None);
        }
        let users =
            std::fs::read_to_string("/etc/passwd").map_err(Error::io("read /etc/passwd"))?;
        let account = users.lines().find_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            let [USER, _, user_id, group_id, ..] = fields.as_slice() else { return None };
            Some(Account { user_id: user_id.parse().ok()?, group_id: group_id.parse().ok()? })
        });
        account.map(Some).ok_or(Error::NoPostgresUser)
    }
}

fn as_account(program: Program, account: Option<Account>) -> Program {
    if account.is_some() { program.user(USER) } else { program }
}

/// A temporary folder the server may use: its own account cannot read what only root may.
fn server_folder(account: Option<Account>) -> Result<Folder, Error> {
    let folder = Folder::create("postgres")?;
    if let Some(Account { user_id, group_id }) = account {
        std::fs::set_permissions(folder.path(), Permissions::from_mode(0o755))
            .and_then(|()| chown(folder.path(), Some(user_id), Some(group_id)))
            .map_err(Error::io(format!("give {} to {USER}", folder.path().display())))?;
    }
    Ok(folder)
}

/// Writes what a server needs that takes no connection in the clear, and says which settings name it.
fn encrypted(
    folder: &Path,
    account: Option<Account>,
    tls: &Tls,
) -> Result<Vec<(String, String)>, Error> {
    // No line lets a connection in that is not encrypted.
    let clients = "hostssl all all 127.0.0.1/32 trust\n";
    let files = [
        ("ssl_cert_file", "server.crt", tls.certificate.as_str()),
        ("ssl_key_file", "server.key", tls.key.as_str()),
        ("hba_file", "clients.conf", clients),
    ];
    let mut settings = vec![("ssl".to_owned(), "on".to_owned())];
    for (setting, name, text) in files {
        let file = folder.join(name);
        std::fs::write(&file, text)
            .and_then(|()| std::fs::set_permissions(&file, Permissions::from_mode(0o600)))
            .and_then(|()| match account {
                Some(Account { user_id, group_id }) => chown(&file, Some(user_id), Some(group_id)),
                None => Ok(()),
            })
            .map_err(Error::io(format!("write {}", file.display())))?;
        settings.push((setting.to_owned(), file.display().to_string()));
    }
    Ok(settings)
}

/// Small, since every cluster begins with a copy of one segment.
const WAL_SEGMENT_MIB: u32 = 1;

/// The data of an empty cluster. Made once in a checkout, since `initdb` takes longer than most tests.
async fn template(bin: &Path, account: Option<Account>) -> Result<PathBuf, Error> {
    let version = run(Program::new("postgres", bin.join("postgres"), "").arg("--version")).await?;
    // "postgres (PostgreSQL) 15.6", on Debian with the package's version behind it.
    let version = version.split_whitespace().nth(2).unwrap_or("unknown");
    let cache = tools::repository().join("target").join("compose");
    let user = rustix::process::geteuid().as_raw();
    let template = cache.join(format!("initdb-{version}-{user}-{WAL_SEGMENT_MIB}"));
    if template.is_dir() {
        return Ok(template);
    }
    tokio::fs::create_dir_all(&cache)
        .await
        .map_err(Error::io(format!("create {}", cache.display())))?;
    let _lock = lock(cache.join("initdb.lock")).await?;
    if template.is_dir() {
        return Ok(template);
    }
    // The cache may lie where the server's account cannot go; the temporary folder does not.
    let work = server_folder(account)?;
    let data = work.path().join("data");
    let initdb = Program::new("initdb", bin.join("initdb"), work.path().join("log"))
        .args(["--no-sync", "--auth=trust", "--encoding=UTF8", "--locale=C"])
        .arg(format!("--wal-segsize={WAL_SEGMENT_MIB}"))
        .args(["--username", USER, "--pgdata"])
        .arg(&data)
        .folder(work.path());
    run(as_account(initdb, account)).await?;
    // Renamed when complete, so that nobody finds half a template.
    let unfinished =
        tempfile::tempdir_in(&cache).map_err(Error::io("create a temporary folder"))?;
    let unfinished_data = unfinished.path().join("data");
    copy(&data, &unfinished_data).await?;
    tokio::fs::rename(&unfinished_data, &template)
        .await
        .map_err(Error::io(format!("create {}", template.display())))?;
    Ok(template)
}

/// Holds the lock until the file is dropped.
async fn lock(path: PathBuf) -> Result<File, Error> {
    let what = format!("lock {}", path.display());
    tokio::task::spawn_blocking(move || {
        File::create(path).and_then(|file| file.lock().map(|()| file))
    })
    .await
    .map_err(|error| std::io::Error::other(error.to_string()))
    .and_then(|result| result)
    .map_err(Error::io(what))
}

/// Copies a folder with its owners and permissions.
async fn copy(from: &Path, to: &Path) -> Result<(), Error> {
    let cp = tools::on_path("cp").unwrap_or_else(|| "/bin/cp".into());
    let program =
        Program::new("cp", cp, "").args(["--archive", "--reflink=auto"]).arg(from).arg(to);
    run(program).await.map(|_| ())
}

/// The server's own note of its state; the first line is its process id, so an old note is told from a new one.
fn says_ready(pid_file: &Path, pid: u32) -> bool {
    let Ok(note) = std::fs::read_to_string(pid_file) else { return false };
    let mut lines = note.lines();
    lines.next() == Some(pid.to_string().as_str())
        && lines.nth(6).is_some_and(|l| l.trim() == "ready")
}

/// The children of a process, as far as the system tells.
fn children(pid: u32) -> Vec<Pid> {
    let listed = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let ids = listed.unwrap_or_default();
    ids.split_whitespace().filter_map(|id| id.parse().ok().and_then(Pid::from_raw)).collect()
}
