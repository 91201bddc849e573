//! Connections that are kept at hand between statements.
//!
//! The pool asks the server once more whenever a connection comes back to it, which takes the server and us as
//! long as a short statement does. What is kept here is used again as it is, by the runtime that made it if it
//! can be: that is told what arrives on it, and would have to wake another.

use std::{
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use sqlx::{
    Postgres,
    pool::PoolConnection,
    postgres::{PgConnection, PgPool},
};
use tokio::{
    runtime::{self, Handle},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout},
};

/// How long one is used.
const AGE_MAX: Duration = Duration::from_secs(30 * 60);
/// How long one is kept unused.
const UNUSED_MAX: Duration = Duration::from_secs(10 * 60);

/// Connections of a pool. Clones share them.
#[derive(Debug, Clone)]
pub struct AtHand {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    pool: PgPool,
    room: Arc<Semaphore>,
    /// The one that was used last is last.
    unused: Mutex<Vec<Unused>>,
}

#[derive(Debug)]
struct Unused {
    connection: PoolConnection<Postgres>,
    since: Instant,
    made: Made,
}

#[derive(Debug, Clone, Copy)]
struct Made {
    at: Instant,
    home: runtime::Id,
}

/// A connection that is being used. Unless it is [kept](Taken::keep) it goes back to the pool, which finds
/// out what state it is in.
#[derive(Debug)]
pub struct Taken {
    connection: Option<PoolConnection<Postgres>>,
    made: Made,
    shared: Arc<Shared>,
    _room: OwnedSemaphorePermit,
}

impl AtHand {
    /// At most so many of the pool's, used or not: others who use the pool have the rest.
    pub fn new(pool: PgPool, connections_max: u32) -> Self {
        let room = Arc::new(Semaphore::new(connections_max.max(1) as usize));
        Self { shared: Arc::new(Shared { pool, room, unused: Mutex::default() }) }
    }

    /// The one of this runtime's that was used last, or one of the pool's, or one of another runtime's when there
    /// are as many as there may be. The wait for it is bounded as the pool's is.
    pub async fn take(&self) -> Result<Taken, sqlx::Error> {
        let shared = &self.shared;
        let room = Arc::clone(&shared.room).acquire_owned();
        let wait_max = shared.pool.options().get_acquire_timeout();
        let room = timeout(wait_max, room).await.map_err(|_| sqlx::Error::PoolTimedOut)?;
        let room = room.expect("the semaphore is never closed");
        let now = Made { at: Instant::now(), home: Handle::current().id() };
        let (connection, made) = match shared.pop(now) {
            Some(unused) => (unused.connection, unused.made),
            // Boxed: it is larger than all that is done with a connection, and most need none of it.
            None => (Box::pin(shared.another()).await?, now),
        };
        Ok(Taken { connection: Some(connection), made, shared: Arc::clone(shared), _room: room })
    }

    /// The pool, for who uses a connection in another way or for long.
    pub fn pool(&self) -> &PgPool {
        &self.shared.pool
    }

    /// Closes the pool, and waits for those that are used.
    pub async fn close(&self) {
        let closed = self.shared.pool.close();
        self.forget();
        closed.await;
    }

    /// Keeps none of those that nobody uses: who has lost one to a server that restarted has lost all.
    pub fn forget(&self) {
        self.shared.forget();
    }
}

impl Shared {
    fn unused(&self) -> MutexGuard<'_, Vec<Unused>> {
        self.unused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn forget(&self) {
        let unused = std::mem::take(&mut *self.unused());
        // Not under the lock.
        drop(unused);
    }

    fn pop(&self, now: Made) -> Option<Unused> {
        let unused = {
            let mut all = self.unused();
            match all.iter().rposition(|unused| unused.made.home == now.home) {
                Some(own) => all.remove(own),
                // Whoever asks has its room.
                None if all.len() <= self.room.available_permits() => return None,
                None => all.pop()?,
            }
        };
        let is_old = AGE_MAX < now.at - unused.made.at || UNUSED_MAX < now.at - unused.since;
        (!is_old).then_some(unused)
    }

    /// A new one. What the pool has left is another runtime's, as far as anybody knows, and may have died since:
    /// only its place is wanted.
    async fn another(&self) -> Result<PoolConnection<Postgres>, sqlx::Error> {
        while let Some(unused) = self.pool.try_acquire() {
            drop(unused.detach());
        }
        self.pool.acquire().await
    }
}

/// Nobody is left to use them. To go back to the pool they would need a runtime, which may have ended.
impl Drop for Shared {
    fn drop(&mut self) {
        let unused = self.unused.get_mut().unwrap_or_else(PoisonError::into_inner);
        for unused in unused.drain(..) {
            drop(unused.connection.detach());
        }
    }
}

impl Taken {
    /// The server has answered everything, and the session is as it was.
    pub fn keep(mut self) {
        let Some(connection) = self.connection.take() else { return };
        let now = Instant::now();
        let mut unused = self.shared.unused();
        // Under the lock: who closes the pool then has forgotten those that nobody uses, or is yet to.
        if self.shared.pool.is_closed() {
            return;
        }
        unused.push(Unused { connection, since: now, made: self.made });
        // The longest unused. At most one at a time, and those above it were used later.
        let old = unused.first().is_some_and(|first| UNUSED_MAX < now - first.since);
        let old = old.then(|| unused.remove(0));
        drop(unused);
        drop(old);
    }

    /// For who does not know what the server still does on it: it is closed, and the place is free at once.
    /// The others are looked at before they are used again.
    pub fn close(mut self) {
        if let Some(connection) = self.connection.take() {
            drop(connection.detach());
        }
        self.shared.forget();
    }
}

impl Deref for Taken {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        self.connection.as_deref().expect("it is taken out by those who own it only")
    }
}

impl DerefMut for Taken {
    fn deref_mut(&mut self) -> &mut PgConnection {
        self.connection.as_deref_mut().expect("it is taken out by those who own it only")
    }
}
