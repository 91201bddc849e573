//! TLS: certificates from files, for listeners and for the connections that we make.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
};

use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use serde::Deserialize;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::config::Period;

/// Why certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read, or is no PEM.
    #[error("{path} cannot be read as PEM")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: rustls::pki_types::pem::Error,
    },
    /// A file has no certificate in it.
    #[error("{0} holds no certificate")]
    Empty(PathBuf),
    /// The key is not the certificate's, or of a kind that is not known.
    #[error("{key} is not the key of {certificate}")]
    Key {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// Why.
        source: rustls::Error,
    },
    /// This machine has no certificates to trust.
    #[error("the machine's own root certificates cannot be read; name a file of them")]
    NoRoots,
    /// What is trusted cannot be.
    #[error("a root certificate cannot be used")]
    Root(#[from] rustls::Error),
}

/// The certificate of a listener.
#[derive(Debug, Clone, Deserialize)]
pub struct ServerTlsConfig {
    /// The certificate and those between it and its root, in PEM.
    pub certificate: PathBuf,
    /// Its key, in PEM.
    pub key: PathBuf,
    /// How often the files are looked at. A certificate that was renewed serves new connections.
    #[serde(default = "reload_interval_default")]
    pub reload_interval: Period,
}

const fn reload_interval_default() -> Period {
    Period::from_secs(30)
}

impl ServerTlsConfig {
    /// What is wrong with it, for [`crate::config::Config::mistakes`]. `section` is where it stands.
    pub fn mistakes(&self, section: &str) -> Vec<String> {
        let unread = certified(self).err().map(|error| format!("{section}: {}", chain(&error)));
        let zero = self.reload_interval.millis() == 0;
        let zero = zero.then(|| format!("{section}.reload_interval: must be above zero"));
        unread.into_iter().chain(zero).collect()
    }
}

/// A listener's side of TLS 1.2 and 1.3, which offers HTTP/2 and HTTP/1.1.
#[derive(Clone)]
pub struct ServerTls {
    /// Takes a connection.
    pub acceptor: TlsAcceptor,
    current: Arc<Current>,
    config: ServerTlsConfig,
}

impl ServerTls {
    /// Reads the files.
    pub fn open(config: &ServerTlsConfig) -> Result<Self, TlsError> {
        let current = Arc::new(Current(RwLock::new(Arc::new(certified(config)?))));
        let mut server = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(&current) as Arc<dyn ResolvesServerCert>);
        server.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let acceptor = TlsAcceptor::from(Arc::new(server));
        Ok(Self { acceptor, current, config: config.clone() })
    }

    /// Reads the files again and again until `stop`. While they cannot be used, the last that could be
    /// are served.
    pub async fn keep_fresh(self, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(self.config.reload_interval.get());
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                _ = ticks.tick() => {}
            }
            match certified(&self.config) {
                Ok(read) if self.current.get().cert != read.cert => {
                    *self.current.0.write().unwrap_or_else(PoisonError::into_inner) =
                        Arc::new(read);
                    tracing::info!(file = %self.config.certificate.display(), "certificate renewed");
                }
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(
                        error = chain(&error),
                        "certificate not read, the last one serves"
                    );
                }
            }
        }
    }
}

impl std::fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerTls").field("config", &self.config).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Current(RwLock<Arc<CertifiedKey>>);

impl Current {
    fn get(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl ResolvesServerCert for Current {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.get())
    }
}

fn certified(config: &ServerTlsConfig) -> Result<CertifiedKey, TlsError> {
    let key = PrivateKeyDer::from_pem_file(&config.key);
    let key = key.map_err(|source| TlsError::File { path: config.key.clone(), source })?;
    CertifiedKey::from_der(certificates(&config.certificate)?, key, &provider()).map_err(|source| {
        TlsError::Key { certificate: config.certificate.clone(), key: config.key.clone(), source }
    })
}

/// Our side of connections that we make: the server's certificate must follow from those in `roots`, or
/// from the machine's own when there is no such file.
pub fn client_config(roots: Option<&Path>) -> Result<ClientConfig, TlsError> {
    let mut store = RootCertStore::empty();
    match roots {
        Some(path) => {
            for certificate in certificates(path)? {
                store.add(certificate)?;
            }
        }
        None => {
            let found = rustls_native_certs::load_native_certs();
            let (known, _) = store.add_parsable_certificates(found.certs);
            if known == 0 {
                return Err(TlsError::NoRoots);
            }
        }
    }
    let client = ClientConfig::builder_with_provider(provider());
    let client = client.with_safe_default_protocol_versions()?;
    Ok(client.with_root_certificates(store).with_no_client_auth())
}

/// Our side where nothing is spoken to but in the clear.
pub(crate) fn trusting_nobody() -> Result<ClientConfig, TlsError> {
    let client = ClientConfig::builder_with_provider(provider());
    let client = client.with_safe_default_protocol_versions()?;
    Ok(client.with_root_certificates(RootCertStore::empty()).with_no_client_auth())
}

/// What is wrong with a file of certificates, for [`crate::config::Config::mistakes`].
pub fn roots_mistakes(key: &str, path: Option<&Path>) -> Vec<String> {
    let read = path.map(certificates);
    let error = read.and_then(Result::err).map(|error| format!("{key}: {}", chain(&error)));
    error.into_iter().collect()
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let unread = |source| TlsError::File { path: path.to_owned(), source };
    let read = CertificateDer::pem_file_iter(path).map_err(unread)?;
    let read = read.collect::<Result<Vec<_>, _>>().map_err(unread)?;
    if read.is_empty() { Err(TlsError::Empty(path.to_owned())) } else { Ok(read) }
}

/// Named, not the process's default: other crates bring theirs.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn chain(error: &dyn std::error::Error) -> String {
    let chain = std::iter::successors(Some(error), |error| error.source());
    chain.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
