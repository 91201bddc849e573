//! A path that leads to a service of the user's own, against nginx in front of the same service.
//!
//! The service answers from memory and says what it read, so that nothing is left unverified. The
//! gateway enforces the token before and after asking it; nginx passes on. So does a proxy of hyper and nothing
//! else, which tells how much of the distance is that between hyper and nginx.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use compose::process::{Child, Program};
use compose::{ports, tools};
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio::sync::Mutex;

use crate::Plan;
use crate::bare::{self, Template};
use crate::events;
use crate::http::Connection;
use crate::load::closed_loop;
use crate::pairs::{Sample, Side, interleave};
use crate::report::{Goal, Line, median};
use crate::seed::{self, Tokens};
use crate::servers::{PATIENCE, Primary, Setup};

pub const NAME: &str = "proxy_pass";

const CONNECTION_COUNT: usize = 64;
const ORDER_COUNT: u64 = 1000;
const DURATION: Duration = Duration::from_secs(2);
/// Where Debian puts it, which is not on everybody's path.
const NGINX: &str = "/usr/sbin/nginx";

/// Requests a second.
pub async fn measure(plan: Plan) -> anyhow::Result<Vec<Line>> {
    let world = World::start().await?;
    let bare = Mutex::new(Vec::new());
    let pairs = interleave(plan.pairs, async |side| {
        let load = match side {
            Side::Ours => {
                closed_loop(&mut world.ours.lock().await, DURATION, Passing::through_gateway)
                    .await?
            }
            Side::Baseline => {
                let load =
                    closed_loop(&mut world.bare.lock().await, DURATION, Passing::through).await?;
                bare.lock().await.push(load.rate());
                closed_loop(&mut world.nginx.lock().await, DURATION, Passing::through).await?
            }
        };
        let remark = format!("({:.2} ms at the median)", load.latency_ms(0.5));
        Ok(Sample { value: load.rate(), remark })
    });
    let line = pairs.await?.into_line(NAME, "requests/s", Goal::RatioMin(0.95));
    // The first did not count for the others either.
    let bare = median(&bare.into_inner()[1..]).unwrap_or(f64::NAN);
    Ok(vec![line.noting(format!("a proxy of hyper and nothing else: {bare:.0} requests/s"))])
}

struct World {
    ours: Mutex<Vec<Passing>>,
    nginx: Mutex<Vec<Passing>>,
    bare: Mutex<Vec<Passing>>,
    _servers: [Child; 3],
    _primary: Primary,
    _folder: TempDir,
}

impl World {
    async fn start() -> anyhow::Result<Self> {
        let [service_port, nginx_port, bare_port] = ports::free_many()?;
        let listen = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let gateway_extra = format!(
            "route = [{{ prefix = \"/notes\", upstream = \"http://127.0.0.1:{service_port}\", \
             projection = \"orders\", policy = \"wait, forward\" }}]"
        );
        let setup = Setup { gateway_extra, has_projector: true, ..Setup::default() };
        let primary = Primary::start(setup).await?;
        let head = seed::place(&primary, (0..ORDER_COUNT).map(events::order_id)).await?;
        let tokens = Arc::new(Tokens::new(&primary, head)?);
        let folder = tempfile::tempdir()?;
        let answer = Template::new("application/json", r#"{"note":"high water at 06:12"}"#)
            .with_header("consistency-position", format!("1.{head}"));
        let service = bare::start(folder.path(), listen(service_port), &answer, None).await?;
        let nginx = nginx(folder.path(), nginx_port, service_port).await?;
        let upstream = listen(service_port);
        let bare = bare::start_proxy(folder.path(), listen(bare_port), upstream).await?;
        let lanes = async |address| -> anyhow::Result<Mutex<Vec<Passing>>> {
            let connections = Connection::open_many(address, CONNECTION_COUNT).await?;
            let lanes = (0..).zip(connections).map(|(lane, connection)| Passing {
                connection,
                tokens: Arc::clone(&tokens),
                nth: lane << 32,
            });
            Ok(Mutex::new(lanes.collect()))
        };
        Ok(Self {
            ours: lanes(primary.address).await?,
            nginx: lanes(listen(nginx_port)).await?,
            bare: lanes(listen(bare_port)).await?,
            _servers: [service, nginx, bare],
            _primary: primary,
            _folder: folder,
        })
    }
}

/// nginx as somebody who wants it fast would set it up.
async fn nginx(folder: &Path, port: u16, upstream: u16) -> anyhow::Result<Child> {
    let config = folder.join("nginx.conf");
    let text = include_str!("proxy/nginx.conf")
        .replace("FOLDER", &folder.to_string_lossy())
        .replace("UPSTREAM", &upstream.to_string())
        .replace("PORT", &port.to_string());
    std::fs::write(&config, text)?;
    let path = tools::on_path("nginx").unwrap_or_else(|| PathBuf::from(NGINX));
    ensure!(path.is_file(), "nginx is missing: use `make bench`");
    let program = Program::new("nginx", path, folder.join("nginx.log"))
        .arg("-p")
        .arg(folder)
        .arg("-c")
        .arg(&config)
        // Its workers are not ours to end: it ends them when it is asked to.
        .end_signal(compose::process::Signal::TERM);
    let nginx = program.spawn()?;
    let listens = async || TcpStream::connect(("127.0.0.1", port)).await.is_ok();
    nginx.wait_until("listening", PATIENCE, listens).await.context("nginx does not start")?;
    Ok(nginx)
}

/// A connection that asks again and again, with another token each time.
struct Passing {
    connection: Connection,
    tokens: Arc<Tokens>,
    nth: u64,
}

impl Passing {
    async fn exchange(&mut self) -> anyhow::Result<crate::http::Answer<'_>> {
        self.nth += 1;
        let token = self.tokens.nth(self.nth)?;
        let request = format!(
            "GET /notes/{} HTTP/1.1\r\nhost: bench\r\nconsistency-token: {token}\r\n\r\n",
            self.nth % ORDER_COUNT
        );
        self.connection.exchange(request.as_bytes()).await?.succeeded()
    }

    async fn through(&mut self) -> anyhow::Result<()> {
        let answer = self.exchange().await?;
        ensure!(answer.body.starts_with(b"{\"note\""), "not the service's answer");
        Ok(())
    }

    async fn through_gateway(&mut self) -> anyhow::Result<()> {
        let answer = self.exchange().await?;
        let status = answer.header("consistency-status").unwrap_or_default();
        ensure!(status.starts_with("local"), "not served at once from here: {status}");
        ensure!(answer.body.starts_with(b"{\"note\""), "not the service's answer");
        Ok(())
    }
}
