//! The rows of the table, one module each or several that share their servers.

mod append;
mod crowd;
mod project;
mod proxy;
mod reads;
mod rebuild;
mod relay;
mod round_trip;
mod wake;

use tokio::runtime::{Builder, Runtime};

use crate::Plan;
use crate::report::Line;

/// A row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Row {
    /// Reads of rows in memory against a bare server.
    FreshReadCached,
    /// Reads of rows from the database against a bare server with the same statement.
    FreshReadDb,
    /// The same, asked for together.
    FreshReadGathered,
    /// A path to a service of one's own against nginx.
    ProxyPass,
    /// Appends over HTTP against plain inserts.
    AppendHttp,
    /// One append at a time against one plain insert at a time.
    AppendLatency,
    /// The relay against a bare publisher.
    Relay,
    /// The projector against a loop that only writes.
    ProjectDocuments,
    /// A rebuild with indexes, checksums and switch against the projector.
    Rebuild,
    /// From a commit to the answer of who waited for it.
    WaitWake,
    /// Write and read across an ocean against an echo.
    RywEndToEnd,
    /// Many readers that wait for one commit.
    #[value(name = "waiters_20k")]
    Waiters20k,
}

impl Row {
    /// In the order of the table.
    pub const ALL: [Self; 12] = [
        Self::FreshReadCached,
        Self::FreshReadDb,
        Self::FreshReadGathered,
        Self::ProxyPass,
        Self::AppendHttp,
        Self::AppendLatency,
        Self::Relay,
        Self::ProjectDocuments,
        Self::Rebuild,
        Self::WaitWake,
        Self::RywEndToEnd,
        Self::Waiters20k,
    ];

    /// As in the report.
    pub const fn name(self) -> &'static str {
        match self {
            Self::FreshReadCached => reads::CACHED.name(),
            Self::FreshReadDb => reads::DATABASE.name(),
            Self::FreshReadGathered => reads::GATHERED.name(),
            Self::ProxyPass => proxy::NAME,
            Self::AppendHttp => append::HTTP,
            Self::AppendLatency => append::LATENCY,
            Self::Relay => relay::NAME,
            Self::ProjectDocuments => project::NAME,
            Self::Rebuild => rebuild::NAME,
            Self::WaitWake => wake::NAME,
            Self::RywEndToEnd => round_trip::NAME,
            Self::Waiters20k => crowd::NAME,
        }
    }

    /// Measures it, on servers of its own.
    pub fn measure(self, plan: Plan) -> anyhow::Result<Vec<Line>> {
        self.runtime()?.block_on(async move {
            match self {
                Self::FreshReadCached => reads::CACHED.measure(plan).await,
                Self::FreshReadDb => reads::DATABASE.measure(plan).await,
                Self::FreshReadGathered => reads::GATHERED.measure(plan).await,
                Self::ProxyPass => proxy::measure(plan).await,
                Self::AppendHttp => append::http(plan).await,
                Self::AppendLatency => append::latency(plan).await,
                Self::Relay => relay::measure(plan).await,
                Self::ProjectDocuments => project::measure(plan).await,
                Self::Rebuild => rebuild::measure(plan).await,
                Self::WaitWake => wake::measure(plan).await,
                Self::RywEndToEnd => round_trip::measure(plan).await,
                Self::Waiters20k => crowd::measure(plan).await,
            }
        })
    }

    /// What makes load gets one thread, so that the other processors are for what is measured; what
    /// is measured in this process gets what the services get. The links of three regions are in this
    /// process too.
    fn runtime(self) -> std::io::Result<Runtime> {
        let mut builder = match self {
            Self::FreshReadCached
            | Self::FreshReadDb
            | Self::FreshReadGathered
            | Self::ProxyPass
            | Self::AppendHttp
            | Self::AppendLatency
            | Self::WaitWake
            | Self::Waiters20k => Builder::new_current_thread(),
            Self::Relay | Self::ProjectDocuments | Self::Rebuild | Self::RywEndToEnd => {
                Builder::new_multi_thread()
            }
        };
        builder.enable_all().build()
    }
}
