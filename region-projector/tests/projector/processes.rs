//! Projectors of the worked example as real processes, which can be killed and frozen.

use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::time::Duration;

use compose::nats::User;
use compose::process::{Child, Program, Signal};
use consistency::Position;
use serde_json::Value;
use tokio::process::Command;
use tokio::time::timeout;
use uuid::Uuid;

use crate::log::CREDENTIAL;
use crate::world::{DEADLINE, LOG_ID, World, eventually};

const BINARY: &str = env!("CARGO_BIN_EXE_region-projector");

/// A projector process.
pub struct Process {
    pub name: String,
    pub child: Child,
    admin_file: PathBuf,
}

impl World {
    /// Writes a configuration; `more` are further tables of it.
    pub fn configure(&self, more: &str) -> PathBuf {
        let (user, password) = self.nats.credentials(User::Projector);
        let (nats, database) = (self.nats.url(), &self.database_url);
        let log = self.log.address;
        let text = format!(
            r#"
            region = "us-east"
            primary_region = "us-east"
            admin.address = "127.0.0.1:0"
            log.id = "{LOG_ID}"
            nats = {{ url = "{nats}", user = "{user}", password = "{password}" }}
            primary_log = {{ url = "http://{log}", credential = "{CREDENTIAL}" }}
            [database]
            url = "{database}"
            idle_in_transaction_timeout = "2s"
            {more}
            "#
        );
        let name = format!("projector-{}.toml", Uuid::new_v4());
        let file = self.postgres.log().with_file_name(name);
        std::fs::write(&file, text).unwrap();
        file
    }

    /// Runs the binary to its end.
    pub async fn operate(&self, arguments: &[&str]) -> Output {
        let run = Command::new(BINARY)
            .arg("--config")
            .arg(self.configure(""))
            .args(arguments)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output();
        timeout(DEADLINE, run).await.expect("ends in time").unwrap()
    }

    /// What it printed, when it found everything well.
    pub async fn told(&self, arguments: &[&str]) -> String {
        let output = self.operate(arguments).await;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    pub async fn told_json(&self, arguments: &[&str]) -> Value {
        let arguments = [arguments, &["--json"]].concat();
        serde_json::from_str(&self.told(&arguments).await).unwrap()
    }

    /// Starts a process that is called `name`, with a lease of so many seconds.
    pub fn process(&self, name: &str, lease_s: u32, environment: &[(&str, &str)]) -> Process {
        let more = format!(
            "[sharing]\nname = \"{name}\"\nlease = \"{lease_s}s\"\nrenew_interval = \"500ms\"\n\
             [apply]\nverify_interval = \"1h\""
        );
        let config = self.configure(&more);
        let log = config.with_extension("log");
        let program = Program::new(name, BINARY, &log).arg("--config").arg(config);
        let program =
            environment.iter().fold(program, |program, (key, value)| program.env(*key, *value));
        Process { name: name.to_owned(), child: program.spawn().unwrap(), admin_file: log }
    }

    /// Places so many orders, each of an id of its own, and says where the last one is.
    pub async fn place(&self, count: usize) -> Position {
        let mut last = Position::ZERO;
        for _ in 0..count {
            let id = format!("o-{}", Uuid::new_v4());
            let event = self.log.append_to("order", &id, "OrderPlaced", PLACED);
            self.publish(&event).await;
            last = event.at.position;
        }
        last
    }

    /// Waits until all partitions of `orders` have stored a position.
    pub async fn orders_stored(&self, position: Position) {
        eventually("the orders are stored", async || {
            let stored = self.orders_checkpoints().await;
            !stored.is_empty() && stored.iter().all(|stored| position.as_i64() <= *stored)
        })
        .await;
    }

    /// The stored positions of `orders`, by partition.
    pub async fn orders_checkpoints(&self) -> Vec<i64> {
        sqlx::query_scalar(
            "select position from checkpoint where projection = 'orders' order by partition",
        )
        .fetch_all(&self.pool)
        .await
        .unwrap_or_default()
    }

    /// Every order is in the rows and in the sums exactly once.
    pub async fn orders_are_exactly(&self, count: i64) {
        let rows = "select count(*) from orders_v1_order_detail where version = 1";
        assert_eq!(self.count(rows).await, count);
        let sum = "select coalesce(sum(order_count), 0)::bigint
                   from totals_by_customer_v1_customer_summary";
        eventually("the sums are there", async || count <= self.count(sum).await).await;
        assert_eq!(self.count(sum).await, count);
    }

    /// Waits until the partitions of `orders` are split like this among processes by name.
    pub async fn split_is(&self, expected: &[(&str, i64)]) {
        let expected: Vec<(String, i64)> =
            expected.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect();
        eventually(&format!("the split is {expected:?}"), async || self.split().await == expected)
            .await;
    }

    /// Who holds how many partitions of `orders`.
    pub async fn split(&self) -> Vec<(String, i64)> {
        sqlx::query_as(
            "select name, count(*) from partition_lease join projector_process using (process)
             where projection = 'orders' group by name order by name",
        )
        .fetch_all(&self.pool)
        .await
        .unwrap_or_default()
    }
}

impl Process {
    /// A metric of one projection, summed over its other labels.
    pub async fn metric(&self, metric: &str, labels: &[&str]) -> f64 {
        let text = reqwest::get(format!("{}/metrics", self.admin_url().await)).await.unwrap();
        let text = text.text().await.unwrap();
        let fits = |line: &&str| {
            line.starts_with(metric) && labels.iter().all(|label| line.contains(label))
        };
        let values = text.lines().filter(fits).filter_map(|line| line.rsplit(' ').next());
        values.filter_map(|value| value.parse::<f64>().ok()).sum()
    }

    /// As its log has it.
    async fn admin_url(&self) -> String {
        let mut found = None;
        eventually("it says where its admin listener is", async || {
            let log = std::fs::read_to_string(&self.admin_file).unwrap_or_default();
            let address = log.lines().find(|line| line.contains("admin listener bound"));
            found = address.and_then(|line| {
                let (_, rest) = line.split_once("127.0.0.1:")?;
                Some(rest.chars().take_while(char::is_ascii_digit).collect::<String>())
            });
            found.is_some()
        })
        .await;
        format!("http://127.0.0.1:{}", found.unwrap())
    }

    /// What it says of its own state.
    pub async fn readiness(&self) -> String {
        let answer = reqwest::get(format!("{}/readyz", self.admin_url().await)).await.unwrap();
        answer.text().await.unwrap()
    }

    /// Ends it in order.
    pub async fn leave(&self) {
        self.child.stop(Signal::TERM, Duration::from_secs(20)).await.unwrap();
        let status = self.child.exit_status().unwrap();
        assert!(status.success(), "{} ended {status}: {}", self.name, self.child.log_tail());
    }
}

pub const PLACED: &str = r#"{"customer_id":"ada","customer_name":"Ada","items":[
    {"product_id":"pen","product_name":"Pen","unit_price_cents":250,"quantity":1}]}"#;
