//! What ours is compared with when it answers requests: hyper and nothing else, in a process of its own
//! with as many threads as a gateway has.

use std::convert::Infallible;
use std::error::Error;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use bytes::Bytes;
use compose::process::{Child, Program};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, Uri};
use http_body_util::{Either, Full};
use hyper::body::{Body, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo};
use process::postgres::AtHand;
use projection::sql::{RowAnswer, RowColumns, ViewStatements};
use projection::{Domain, ProjectionDefinition};
use serde::{Deserialize, Serialize};
use sqlx::postgres::PgPoolOptions;
use sqlx::{AssertSqlSafe, PgPool};
use tokio::net::TcpListener;

use crate::http::Answer;
use crate::servers::PATIENCE;

/// As many connections as a gateway has to its read models.
const POOL_CONNECTION_COUNT: u32 = 16;

/// A bare server.
#[derive(Debug, clap::Subcommand)]
pub enum Bare {
    /// Answers every request with the bytes of a file.
    #[command(hide = true)]
    Fixed {
        /// Where it listens.
        listen: SocketAddr,
        /// What it answers.
        template: PathBuf,
    },
    /// Answers with the row that a path ends with, by the statement that a gateway uses.
    #[command(hide = true)]
    Rows {
        /// Where it listens.
        listen: SocketAddr,
        /// What else it answers.
        template: PathBuf,
        /// Where the rows are.
        database: String,
        /// Keeps connections at hand, as a gateway does.
        #[arg(long)]
        keep: bool,
    },
    /// Passes every request on, and its answer back.
    #[command(hide = true)]
    Pass {
        /// Where it listens.
        listen: SocketAddr,
        /// Where the service listens.
        upstream: SocketAddr,
    },
}

/// An answer to be given again.
#[derive(Debug, Serialize, Deserialize)]
pub struct Template {
    headers: Vec<(String, String)>,
    body: String,
}

impl Template {
    /// A body of a kind.
    pub fn new(content_type: &str, body: &str) -> Self {
        let headers = vec![("content-type".to_owned(), content_type.to_owned())];
        Self { headers, body: body.to_owned() }
    }

    /// Of an answer, without what a server adds by itself.
    pub fn of(answer: &Answer<'_>) -> Self {
        let own = |name: &str| ["content-length", "date"].contains(&name);
        let headers = answer.headers().filter(|(name, _)| !own(name));
        let body = String::from_utf8_lossy(answer.body).into_owned();
        Self { headers: headers.collect(), body }
    }

    /// The same with one more header.
    #[must_use]
    pub fn with_header(mut self, name: &str, value: String) -> Self {
        self.headers.push((name.to_owned(), value));
        self
    }
}

/// Where a bare server finds the rows.
#[derive(Debug, Clone)]
pub struct Database {
    /// Its URL.
    pub url: String,
    /// Whether connections are kept at hand, as a gateway does, or come from a pool as it is.
    pub keeps: bool,
}

/// Starts a bare server and waits until it listens. What it is to answer is written beside its log.
pub async fn start(
    folder: &Path,
    listen: SocketAddr,
    template: &Template,
    database: Option<Database>,
) -> anyhow::Result<Child> {
    let file = folder.join(format!("{}.json", listen.port()));
    std::fs::write(&file, serde_json::to_string(template)?)?;
    let kind = if database.is_some() { "rows" } else { "fixed" };
    let program = Program::new("bare server", std::env::current_exe()?, folder.join("bare.log"));
    let keep = database.as_ref().filter(|database| database.keeps).map(|_| "--keep");
    let program = program.arg(kind).arg(listen.to_string()).arg(file).args(keep);
    listening(program.args(database.map(|database| database.url)), listen).await
}

/// Starts a bare proxy and waits until it listens.
pub async fn start_proxy(
    folder: &Path,
    listen: SocketAddr,
    upstream: SocketAddr,
) -> anyhow::Result<Child> {
    let program = Program::new("bare proxy", std::env::current_exe()?, folder.join("pass.log"));
    listening(program.arg("pass").arg(listen.to_string()).arg(upstream.to_string()), listen).await
}

async fn listening(program: Program, listen: SocketAddr) -> anyhow::Result<Child> {
    let server = program.spawn()?;
    let listens = async || tokio::net::TcpStream::connect(listen).await.is_ok();
    server.wait_until("listening", PATIENCE, listens).await?;
    Ok(server)
}

impl Bare {
    /// Serves until it is killed.
    pub async fn serve(self) -> anyhow::Result<()> {
        match self {
            Self::Fixed { listen, template } => {
                let template = Arc::new(Prepared::read(&template)?);
                let answer = move |_| {
                    let template = Arc::clone(&template);
                    async move { template.response(template.body.clone()) }
                };
                serve(listen, answer).await
            }
            Self::Rows { listen, template, database, keep } => {
                let template = Arc::new(Prepared::read(&template)?);
                let rows = Arc::new(Rows::open(&database, keep).await?);
                let answer = move |request: Request<Incoming>| {
                    let (template, rows) = (Arc::clone(&template), Arc::clone(&rows));
                    async move {
                        let (_, id) = request.uri().path().rsplit_once('/').unwrap_or_default();
                        let body = rows.body(id).await.unwrap_or_else(|error| error.to_string());
                        template.response(body.into())
                    }
                };
                serve(listen, answer).await
            }
            Self::Pass { listen, upstream } => {
                let mut connector = HttpConnector::new();
                connector.set_nodelay(true);
                let client = Client::builder(TokioExecutor::new()).build(connector);
                let authority = Authority::try_from(upstream.to_string())?;
                let answer = move |mut request: Request<Incoming>| {
                    let path = request.uri().path_and_query().cloned();
                    let uri = Uri::builder().scheme(Scheme::HTTP).authority(authority.clone());
                    let uri = uri.path_and_query(path.unwrap_or(PathAndQuery::from_static("/")));
                    let client = client.clone();
                    async move {
                        *request.uri_mut() = uri.build().unwrap_or_default();
                        let answer = client.request(request).await;
                        answer.map(|answer| answer.map(Either::Left)).unwrap_or_else(|error| {
                            let mut failed = Response::new(Either::Right(error.to_string()));
                            *failed.status_mut() = StatusCode::BAD_GATEWAY;
                            failed
                        })
                    }
                };
                serve(listen, answer).await
            }
        }
    }
}

async fn serve<F, R, B>(listen: SocketAddr, answer: F) -> anyhow::Result<()>
where
    F: Fn(Request<Incoming>) -> R + Clone + Send + Sync + 'static,
    R: Future<Output = Response<B>> + Send + 'static,
    B: Body<Data: Send, Error: Into<Box<dyn Error + Send + Sync>>> + Send + 'static,
{
    let listener = TcpListener::bind(listen).await?;
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let answer = answer.clone();
        let service = service_fn(move |request| {
            let answered = answer(request);
            async move { Ok::<_, Infallible>(answered.await) }
        });
        tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
    }
}

/// A template, ready to be answered with.
struct Prepared {
    headers: HeaderMap,
    body: Bytes,
}

impl Prepared {
    fn read(file: &Path) -> anyhow::Result<Self> {
        let template: Template = serde_json::from_str(&std::fs::read_to_string(file)?)?;
        let mut headers = HeaderMap::new();
        for (name, value) in template.headers {
            headers.append(name.parse::<HeaderName>()?, value.parse::<HeaderValue>()?);
        }
        Ok(Self { headers, body: template.body.into() })
    }

    fn response(&self, body: Bytes) -> Response<Full<Bytes>> {
        let mut response = Response::new(Full::new(body));
        *response.headers_mut() = self.headers.clone();
        response
    }
}

/// The rows of the view of orders.
struct Rows {
    domain: Domain,
    pool: PgPool,
    kept: Option<AtHand>,
}

impl Rows {
    async fn open(database: &str, keep: bool) -> anyhow::Result<Self> {
        let pool = PgPoolOptions::new()
            .max_connections(POOL_CONNECTION_COUNT)
            .acquire_timeout(PATIENCE)
            .test_before_acquire(false)
            .connect(database)
            .await?;
        let kept = keep.then(|| AtHand::new(pool.clone(), POOL_CONNECTION_COUNT));
        Ok(Self { domain: orders::domain()?, pool, kept })
    }

    async fn body(&self, id: &str) -> anyhow::Result<String> {
        let definition = self.domain.projection("orders", 1).context("the domain has orders")?;
        let statement = AssertSqlSafe(read_statement(definition)?);
        let partition = definition.partition_count().partition_of(id);
        let query = sqlx::query_as(statement).bind(i32::from(partition)).bind(id);
        let columns: RowColumns = match &self.kept {
            Some(kept) => {
                let mut connection = kept.take().await?;
                let columns = query.fetch_one(&mut *connection).await?;
                connection.keep();
                columns
            }
            None => query.fetch_one(&self.pool).await?,
        };
        let row = RowAnswer::from_columns(columns)?.row.context("there is no such row")?;
        Ok(format!(r#"{{"key":"{id}","version":{},"data":{}}}"#, row.version, row.data))
    }
}

fn read_statement(definition: &ProjectionDefinition) -> anyhow::Result<Arc<str>> {
    let rows = definition.statements().views.iter().find_map(|view| match view {
        ViewStatements::Row(row) => Some(Arc::clone(&row.read)),
        ViewStatements::List(_) | ViewStatements::Rollup(_) | ViewStatements::Search(_) => None,
    });
    rows.context("orders have a row view")
}
