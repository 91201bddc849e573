//! A region of which nothing is in the clear: its Postgres, its NATS server and the primary's log.

use std::path::PathBuf;

use compose::nats::{self, Server};
use compose::postgres::{self, Cluster, Options};
use process::admin::Condition;
use process::config::{Period, SecretUrl};
use process::tls::{ServerTls, ServerTlsConfig};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use region_projector::ProjectorConfig;
use serde_json::Value;

use crate::log::TestLog;
use crate::tally::domain;
use crate::world::{World, eventually, stop};

/// A root that nobody knows but us, and a certificate of this machine that follows from it.
struct Certificates(tempfile::TempDir);

impl Certificates {
    fn new() -> Self {
        let made = Self(tempfile::tempdir().unwrap());
        let mut root = CertificateParams::new(Vec::new()).unwrap();
        root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = CertifiedIssuer::self_signed(root, KeyPair::generate().unwrap()).unwrap();
        let own = KeyPair::generate().unwrap();
        let names = CertificateParams::new(vec!["127.0.0.1".to_owned(), "localhost".to_owned()]);
        let certificate = names.unwrap().signed_by(&own, &root).unwrap();
        std::fs::write(made.ca(), root.pem()).unwrap();
        std::fs::write(made.own().0, certificate.pem()).unwrap();
        std::fs::write(made.own().1, own.serialize_pem()).unwrap();
        made
    }

    fn ca(&self) -> PathBuf {
        self.0.path().join("ca.pem")
    }

    fn own(&self) -> (PathBuf, PathBuf) {
        (self.0.path().join("own.pem"), self.0.path().join("own.key"))
    }

    async fn world(&self) -> World {
        let (certificate, key) = self.own();
        let texts = [&certificate, &key].map(|file| std::fs::read_to_string(file).unwrap());
        let [text, key_text] = texts;
        let tls = Some(postgres::Tls { certificate: text, key: key_text });
        let postgres = Cluster::start(Options { tls, ..Options::default() });
        let log = ServerTls::open(&ServerTlsConfig {
            certificate: certificate.clone(),
            key: key.clone(),
            reload_interval: Period::from_secs(60),
        });
        let nats = Server::start_single_over(Some(nats::Tls { certificate, key, ca: self.ca() }));
        let (nats, postgres) = tokio::join!(nats, Box::pin(postgres));
        let log = TestLog::start_over(Some(log.unwrap())).await;
        World::around(nats.unwrap(), postgres.unwrap(), log).await
    }

    /// A projector's configuration in which nothing is in the clear.
    fn over_tls(&self, world: &World) -> ProjectorConfig {
        let mut config = world.config();
        let ca = self.ca().display().to_string();
        let database = format!("{}?sslmode=verify-full&sslrootcert={ca}", world.database_url);
        config.database = process::postgres::PostgresConfig::new(database);
        config.nats.server.tls_ca = Some(self.ca());
        config.nats.server.tls_required = true;
        config.primary_log.url = SecretUrl::new(format!("https://{}", world.log.address));
        config.primary_log.tls_ca = Some(self.ca());
        config
    }
}

#[tokio::test]
async fn a_projector_whose_every_connection_is_encrypted_applies_and_fetches_events() {
    let certificates = Certificates::new();
    let world = Box::pin(certificates.world()).await;
    let config = certificates.over_tls(&world);
    let projector = world.try_projector(config.clone(), domain()).await.unwrap();
    world.stored(world.add("a", 1).await).await;
    // What the stream does not have comes from the log.
    let lost = world.add("a", 2).await;
    world.lose(lost).await;
    world.stored(world.add("a", 3).await).await;
    assert_eq!(world.tally("a").await, Some((6, 3)));
    assert_encrypted(&world).await;
    stop(projector).await;
    // Who trusts another root does not speak to the log, and says so.
    let other = Certificates::new();
    let mut doubting = config;
    doubting.primary_log.tls_ca = Some(other.ca());
    let projector = world.try_projector(doubting, domain()).await.unwrap();
    eventually("the log is not spoken to", async || {
        let conditions = projector.readiness().report(None).conditions;
        matches!(conditions.get("log"), Some(Condition::Degraded(_)))
    })
    .await;
    stop(projector).await;
}

/// Every connection of the projector is encrypted, as the servers see it.
async fn assert_encrypted(world: &World) {
    let url = format!("{}/connz", world.nats.monitor_url());
    let told: Value = reqwest::get(url).await.unwrap().json().await.unwrap();
    let connections = told["connections"].as_array().unwrap();
    assert!(2 <= connections.len(), "{told}");
    assert!(connections.iter().all(|connection| connection["tls_version"].is_string()), "{told}");
    let all = "select count(*), bool_and(ssl) from pg_stat_ssl join pg_stat_activity using (pid)
               where datname = current_database() and application_name <> 'test'";
    let (count, all): (i64, bool) = sqlx::query_as(all).fetch_one(&world.pool).await.unwrap();
    assert!(0 < count && all, "{count}");
}
