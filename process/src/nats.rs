//! A connection to a NATS server that outlives the server.

use std::{path::PathBuf, time::Duration};

use async_nats::{ConnectOptions, Event};
use serde::Deserialize;
use tokio::sync::watch;

use crate::{
    config::{Period, Secret, SecretUrl},
    tls,
};

/// Where the server is and who we are.
#[derive(Debug, Clone, Deserialize)]
pub struct NatsConfig {
    /// As in `nats://127.0.0.1:4222`.
    pub url: SecretUrl,
    /// Name of our NATS user.
    pub user: Option<String>,
    /// Its password.
    pub password: Option<Secret>,
    /// Certificates, in PEM, that the server's must follow from.
    pub tls_ca: Option<PathBuf>,
    /// Our own certificate, in PEM, for a server that asks for one.
    pub tls_certificate: Option<PathBuf>,
    /// Its key, in PEM.
    pub tls_key: Option<PathBuf>,
    /// Refuse to speak in the clear.
    #[serde(default)]
    pub tls_required: bool,
    /// Bound on one attempt to connect.
    #[serde(default = "NatsConfig::connect_timeout_default")]
    pub connect_timeout: Period,
    /// Bound on one request.
    #[serde(default = "NatsConfig::request_timeout_default")]
    pub request_timeout: Period,
}

impl NatsConfig {
    /// A server without users, with the timeouts that are shipped.
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: SecretUrl::new(url),
            user: None,
            password: None,
            tls_ca: None,
            tls_certificate: None,
            tls_key: None,
            tls_required: false,
            connect_timeout: Self::connect_timeout_default(),
            request_timeout: Self::request_timeout_default(),
        }
    }

    /// What is wrong with it, for [`crate::config::Config::mistakes`].
    pub fn mistakes(&self) -> Vec<String> {
        let mut mistakes = tls::roots_mistakes("nats.tls_ca", self.tls_ca.as_deref());
        let own = tls::roots_mistakes("nats.tls_certificate", self.tls_certificate.as_deref());
        mistakes.extend(own);
        if self.tls_certificate.is_some() != self.tls_key.is_some() {
            mistakes.push("nats.tls_key: goes with nats.tls_certificate".to_owned());
        }
        mistakes
    }

    const fn connect_timeout_default() -> Period {
        Period::from_secs(5)
    }

    const fn request_timeout_default() -> Period {
        Period::from_secs(5)
    }
}

/// Whether the connection stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Link {
    /// It stands now.
    pub connected: bool,
    /// How often it was made. Whoever sees this rise may have missed messages.
    pub connect_count: u64,
}

/// A client and the state of its connection.
#[derive(Debug, Clone)]
pub struct Nats {
    /// Cheap to clone. Subscriptions survive reconnects; messages meanwhile are lost.
    pub client: async_nats::Client,
    /// Changes with each connect and disconnect.
    pub link: watch::Receiver<Link>,
}

const RECONNECT_DELAY_MAX: Duration = Duration::from_secs(1);
const RECONNECT_DELAY_STEP: Duration = Duration::from_millis(50);

/// Connects in the background and stays at it for ever: a process starts, and keeps running,
/// without its NATS server. Fails only on what no retry would mend.
pub async fn connect(config: &NatsConfig, name: &str) -> Result<Nats, async_nats::ConnectError> {
    let (sender, link) = watch::channel(Link::default());
    let mut options = ConnectOptions::new()
        .name(name)
        .connection_timeout(config.connect_timeout.get())
        .request_timeout(Some(config.request_timeout.get()))
        .retry_on_initial_connect()
        .max_reconnects(None)
        // The servers of a cluster must not lead us around the way that config gives.
        .ignore_discovered_servers()
        .require_tls(config.tls_required)
        .reconnect_delay_callback(|attempt| {
            let attempt = u32::try_from(attempt).unwrap_or(u32::MAX);
            RECONNECT_DELAY_STEP.saturating_mul(attempt).min(RECONNECT_DELAY_MAX)
        })
        .event_callback(move |event| {
            note(&sender, &event);
            std::future::ready(())
        });
    if let (Some(user), Some(password)) = (&config.user, &config.password) {
        options = options.user_and_password(user.clone(), password.expose().to_owned());
    }
    if let Some(certificates) = &config.tls_ca {
        options = options.add_root_certificates(certificates.clone());
    }
    if let (Some(certificate), Some(key)) = (&config.tls_certificate, &config.tls_key) {
        options = options.add_client_certificate(certificate.clone(), key.clone());
    }
    let client = options.connect(config.url.expose()).await?;
    Ok(Nats { client, link })
}

fn note(sender: &watch::Sender<Link>, event: &Event) {
    match event {
        Event::Connected => {
            tracing::info!("connected to nats");
            sender.send_modify(|link| {
                *link = Link { connected: true, connect_count: link.connect_count + 1 };
            });
        }
        Event::Disconnected | Event::Closed => {
            tracing::warn!(%event, "connection to nats lost");
            sender.send_modify(|link| link.connected = false);
        }
        Event::LameDuckMode | Event::Draining => tracing::info!(%event, "nats announces an end"),
        Event::SlowConsumer(_) => tracing::warn!(%event, "messages of nats were dropped"),
        Event::ServerError(_) | Event::ClientError(_) => {
            tracing::warn!(%event, "nats reports an error");
        }
    }
}
