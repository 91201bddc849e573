//! Connections for an HTTP client: in the clear or over TLS as the URL says, with a bound on the whole
//! of connecting.

use std::{
    path::Path,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use http::Uri;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder, MaybeHttpsStream};
use hyper_util::{client::legacy::connect::HttpConnector, rt::TokioIo};
use tokio::net::TcpStream;
use tower::Service;

use crate::tls::{self, TlsError};

/// Which versions of HTTP are spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocols {
    /// HTTP/1.1 and nothing else.
    Http1,
    /// HTTP/2 and nothing else.
    Http2,
    /// HTTP/1.1, or HTTP/2 where TLS says that the server knows it.
    Any,
}

/// Makes connections. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Connector {
    inner: HttpsConnector<HttpConnector>,
    timeout: Duration,
}

/// For servers like the one at `url`. Its certificate, when it is an `https` one, must follow from those
/// in the file `roots`, or from the machine's own.
pub fn connector(
    url: &Uri,
    roots: Option<&Path>,
    timeout: Duration,
    protocols: Protocols,
) -> Result<Connector, TlsError> {
    let is_encrypted = url.scheme() == Some(&http::uri::Scheme::HTTPS);
    let tls = if is_encrypted { tls::client_config(roots)? } else { tls::trusting_nobody()? };
    let mut plain = HttpConnector::new();
    plain.set_nodelay(true);
    plain.enforce_http(false);
    let builder = HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http();
    let inner = match protocols {
        Protocols::Http1 => builder.enable_http1().wrap_connector(plain),
        Protocols::Http2 => builder.enable_http2().wrap_connector(plain),
        Protocols::Any => builder.enable_all_versions().wrap_connector(plain),
    };
    Ok(Connector { inner, timeout })
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;

impl Service<Uri> for Connector {
    type Response = MaybeHttpsStream<TokioIo<TcpStream>>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(context)
    }

    /// The handshake of TLS counts: a server that took the connection and then fell silent would
    /// otherwise hold up everybody who waits for it.
    fn call(&mut self, url: Uri) -> Self::Future {
        let connecting = tokio::time::timeout(self.timeout, self.inner.call(url));
        Box::pin(async move { connecting.await? })
    }
}
