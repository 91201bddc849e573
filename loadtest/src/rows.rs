//! The rows of the table, one module each or two that share their servers.

mod append;
mod project;
mod relay;

use tokio::runtime::{Builder, Runtime};

use crate::Plan;
use crate::report::Line;

/// A row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Row {
    /// Appends over HTTP against plain inserts.
    AppendHttp,
    /// One append at a time against one plain insert at a time.
    AppendLatency,
    /// The relay against a bare publisher.
    Relay,
    /// The projector against a loop that only writes.
    ProjectDocuments,
}

impl Row {
    /// In the order of the table.
    pub const ALL: [Self; 4] =
        [Self::AppendHttp, Self::AppendLatency, Self::Relay, Self::ProjectDocuments];

    /// As in the report.
    pub const fn name(self) -> &'static str {
        match self {
            Self::AppendHttp => append::HTTP,
            Self::AppendLatency => append::LATENCY,
            Self::Relay => relay::NAME,
            Self::ProjectDocuments => project::NAME,
        }
    }

    /// Measures it, on servers of its own.
    pub fn measure(self, plan: Plan) -> anyhow::Result<Vec<Line>> {
        self.runtime()?.block_on(async move {
            match self {
                Self::AppendHttp => append::http(plan).await,
                Self::AppendLatency => append::latency(plan).await,
                Self::Relay => relay::measure(plan).await,
                Self::ProjectDocuments => project::measure(plan).await,
            }
        })
    }

    /// What makes load gets one thread, so that the other processors are for what is measured; what
    /// is measured in this process gets what the services get.
    fn runtime(self) -> std::io::Result<Runtime> {
        let mut builder = match self {
            Self::AppendHttp | Self::AppendLatency => Builder::new_current_thread(),
            Self::Relay | Self::ProjectDocuments => Builder::new_multi_thread(),
        };
        builder.enable_all().build()
    }
}
