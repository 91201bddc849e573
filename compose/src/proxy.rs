//! The WAN between regions: TCP proxies that delay, cut and heal, driven through an HTTP API.
//!
//! The API is a subset of Toxiproxy's (<https://github.com/Shopify/toxiproxy>), so that the same scripts drive either.
//! A *disabled* proxy closes its connections and refuses new ones; a `timeout` toxic of 0 ms swallows what is sent
//! and closes nothing while it lasts, as a broken wide area link would.

mod api;
mod link;
mod toxic;

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::Error;

pub use toxic::{Stream, Toxic, ToxicKind};

use link::Weather;

/// Before a listener that cannot take connections, for want of file descriptors say, tries again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How long a port that is taken is asked for.
const PORT_PATIENCE: Duration = Duration::from_millis(500);

/// Between two times.
const PORT_PAUSE: Duration = Duration::from_millis(20);

/// The proxies of a topology and their HTTP API. All end when the last clone is dropped.
#[derive(Debug, Clone)]
pub struct Proxies {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    address: SocketAddr,
    by_name: Mutex<BTreeMap<String, Arc<Proxy>>>,
    stop: CancellationToken,
    /// The API's listener and connections.
    tasks: TaskTracker,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// Why the proxies refused an order.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    /// There is no proxy of that name.
    #[error("proxy not found")]
    NoSuchProxy,
    /// The proxy has no toxic of that name.
    #[error("toxic not found")]
    NoSuchToxic,
    /// A proxy of that name is there already.
    #[error("proxy already exists")]
    ProxyExists,
    /// A toxic of that name is there already.
    #[error("toxic already exists")]
    ToxicExists,
    /// The proxy cannot listen on its address.
    #[error("could not listen on {address}")]
    Listen {
        /// The address that was asked for.
        address: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
}

impl Proxies {
    /// Starts the HTTP API on a loopback port, with no proxies yet.
    pub async fn start(port: u16) -> Result<Self, Error> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))
            .await
            .map_err(Error::io(format!("listen on port {port}")))?;
        let address = listener.local_addr().map_err(Error::io("read the API's address"))?;
        let stop = CancellationToken::new();
        let by_name = Mutex::new(BTreeMap::new());
        let tasks = TaskTracker::new();
        let inner = Inner { address, by_name, stop: stop.clone(), tasks: tasks.clone() };
        let proxies = Proxies { inner: Arc::new(inner) };
        // The API must not keep its own proxies alive.
        let api = api::Api { proxies: Arc::downgrade(&proxies.inner), stop, tasks: tasks.clone() };
        tasks.spawn(api.serve(listener));
        Ok(proxies)
    }

    /// The URL of the HTTP API.
    pub fn url(&self) -> String {
        format!("http://{}", self.inner.address)
    }

    /// Adds a proxy that takes connections on `listen` and passes them to `upstream`, both `host:port`.
    pub async fn create(&self, name: &str, listen: &str, upstream: &str) -> Result<(), ProxyError> {
        if self.get(name).is_ok() {
            return Err(ProxyError::ProxyExists);
        }
        let proxy = Arc::new(Proxy::new(name, upstream));
        proxy.enable(listen).await?;
        // Listed when it listens; the name may have been taken meanwhile.
        let mut by_name = self.lock();
        if by_name.contains_key(name) {
            return Err(ProxyError::ProxyExists);
        }
        by_name.insert(name.to_owned(), proxy);
        Ok(())
    }

    /// Cuts (`false`) or heals (`true`) a link. Returns when the cut connections are closed.
    pub async fn set_enabled(&self, name: &str, enabled: bool) -> Result<(), ProxyError> {
        let proxy = self.get(name)?;
        if enabled {
            return proxy.enable(&proxy.listen()).await;
        }
        proxy.disable().await;
        Ok(())
    }

    /// Adds a toxic to a proxy; it acts on what is sent from now on.
    pub fn add_toxic(&self, proxy: &str, toxic: Toxic) -> Result<(), ProxyError> {
        self.get(proxy)?.change_toxics(|toxics| {
            if toxics.iter().any(|other| other.name == toxic.name) {
                return Err(ProxyError::ToxicExists);
            }
            toxics.push(toxic);
            Ok(())
        })
    }

    /// Takes a toxic away again.
    pub fn remove_toxic(&self, proxy: &str, toxic: &str) -> Result<(), ProxyError> {
        self.get(proxy)?.change_toxics(|toxics| {
            let index =
                toxics.iter().position(|t| t.name == toxic).ok_or(ProxyError::NoSuchToxic)?;
            toxics.remove(index);
            Ok(())
        })
    }

    /// Bytes passed on so far: towards the upstream, and back.
    pub fn bytes(&self, proxy: &str) -> Result<(u64, u64), ProxyError> {
        Ok(self.get(proxy)?.counters.bytes())
    }

    /// Heals every link and takes every toxic away.
    pub async fn reset(&self) -> Result<(), ProxyError> {
        let all: Vec<Arc<Proxy>> = self.lock().values().cloned().collect();
        for proxy in all {
            proxy.change_toxics(|toxics| {
                toxics.clear();
                Ok(())
            })?;
            proxy.enable(&proxy.listen()).await?;
        }
        Ok(())
    }

    /// Cuts every link and closes the API. Returns when nothing listens any more.
    pub async fn stop(&self) {
        let all = std::mem::take(&mut *self.lock());
        for proxy in all.into_values() {
            proxy.disable().await;
        }
        self.inner.stop.cancel();
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }

    async fn delete(&self, name: &str) -> Result<(), ProxyError> {
        let proxy = self.lock().remove(name).ok_or(ProxyError::NoSuchProxy)?;
        proxy.disable().await;
        Ok(())
    }

    fn get(&self, name: &str) -> Result<Arc<Proxy>, ProxyError> {
        self.lock().get(name).cloned().ok_or(ProxyError::NoSuchProxy)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Proxy>>> {
        self.inner.by_name.lock().expect("no holder of the lock can panic")
    }
}

/// One link: a listener and the connections it took.
#[derive(Debug)]
struct Proxy {
    name: String,
    upstream: String,
    state: Mutex<State>,
    /// Only one order at a time opens or closes the listener.
    switching: tokio::sync::Mutex<()>,
    weather: watch::Sender<Weather>,
    counters: Arc<Counters>,
}

#[derive(Debug, Default)]
struct State {
    listen: String,
    /// What is running while the link is up.
    up: Option<Up>,
    toxics: Vec<Toxic>,
}

#[derive(Debug)]
struct Up {
    stop: CancellationToken,
    tasks: TaskTracker,
}

/// What a proxy has passed on.
#[derive(Debug, Default)]
struct Counters {
    to_upstream: AtomicU64,
    from_upstream: AtomicU64,
    connections: AtomicU64,
}

impl Counters {
    fn bytes(&self) -> (u64, u64) {
        (self.to_upstream.load(Ordering::Relaxed), self.from_upstream.load(Ordering::Relaxed))
    }
}

impl Proxy {
    fn new(name: &str, upstream: &str) -> Self {
        Proxy {
            name: name.to_owned(),
            upstream: upstream.to_owned(),
            state: Mutex::new(State::default()),
            switching: tokio::sync::Mutex::new(()),
            weather: watch::Sender::new(Weather::default()),
            counters: Arc::new(Counters::default()),
        }
    }

    fn listen(&self) -> String {
        self.lock().listen.clone()
    }

    fn is_enabled(&self) -> bool {
        self.lock().up.is_some()
    }

    async fn enable(&self, listen: &str) -> Result<(), ProxyError> {
        let _switching = self.switching.lock().await;
        if self.is_enabled() {
            return Ok(());
        }
        let refused = |source| ProxyError::Listen { address: listen.to_owned(), source };
        let listener = listener(listen).await.map_err(refused)?;
        let address = listener.local_addr().map_err(refused)?;
        let up = Up { stop: CancellationToken::new(), tasks: TaskTracker::new() };
        let line = link::Line {
            upstream: self.upstream.clone(),
            weather: self.weather.subscribe(),
            counters: Arc::clone(&self.counters),
            stop: up.stop.clone(),
            tasks: up.tasks.clone(),
        };
        up.tasks.spawn(line.accept(listener));
        let mut state = self.lock();
        // The port that was found when `listen` left it open stays through every later cut.
        state.listen = address.to_string();
        state.up = Some(up);
        Ok(())
    }

    async fn disable(&self) {
        let _switching = self.switching.lock().await;
        let up = self.lock().up.take();
        if let Some(up) = up {
            up.stop.cancel();
            up.tasks.close();
            up.tasks.wait().await;
        }
    }

    fn toxics(&self) -> Vec<Toxic> {
        self.lock().toxics.clone()
    }

    fn change_toxics<T>(
        &self,
        change: impl FnOnce(&mut Vec<Toxic>) -> Result<T, ProxyError>,
    ) -> Result<T, ProxyError> {
        let mut state = self.lock();
        let result = change(&mut state.toxics)?;
        self.weather.send_replace(Weather::of(&state.toxics));
        Ok(result)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of the lock can panic")
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// Listens. A program that another thread was starting when this listener was closed before has it for a moment
/// longer, so a port that is taken is asked for again.
async fn listener(address: &str) -> io::Result<TcpListener> {
    let end = Instant::now() + PORT_PATIENCE;
    loop {
        match TcpListener::bind(address).await {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < end => {
                sleep(PORT_PAUSE).await;
            }
            bound => return bound,
        }
    }
}
