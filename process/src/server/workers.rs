//! Threads that answer requests, each with a runtime of its own.
//!
//! A connection stays with the thread that it was given to, and so does what a request needs on its way: no
//! task is handed from thread to thread, and nothing that one of them keeps warm is fetched by another.

use std::{
    io,
    num::NonZeroUsize,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use tokio::{
    runtime::{Builder, Handle},
    sync::oneshot,
};

/// Threads with their runtimes, which end with it.
#[derive(Debug)]
pub struct Workers(Vec<Worker>);

#[derive(Debug)]
struct Worker {
    runtime: Handle,
    connection_count: Arc<AtomicUsize>,
    /// Its thread ends with this.
    _running: oneshot::Sender<()>,
}

/// A connection's place with one of them.
#[derive(Debug)]
pub struct Seat {
    /// Where it is served.
    pub runtime: Handle,
    connection_count: Arc<AtomicUsize>,
}

impl Workers {
    /// Starts so many threads; `None`: as many as there are processors.
    pub fn start(count: Option<NonZeroUsize>) -> io::Result<Self> {
        let count = match count {
            Some(count) => count,
            None => thread::available_parallelism()?,
        };
        (0..count.get()).map(Worker::start).collect::<io::Result<_>>().map(Self)
    }

    /// With the one that has the fewest connections.
    pub fn seat(&self) -> Seat {
        let count = |worker: &&Worker| worker.connection_count.load(Ordering::Relaxed);
        let worker = self.0.iter().min_by_key(count).expect("there is at least one");
        worker.connection_count.fetch_add(1, Ordering::Relaxed);
        Seat {
            runtime: worker.runtime.clone(),
            connection_count: Arc::clone(&worker.connection_count),
        }
    }
}

impl Worker {
    fn start(number: usize) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (running, ended) = oneshot::channel();
        thread::Builder::new().name(format!("worker {number}")).spawn(move || {
            // Nothing is ever sent.
            let _ = runtime.block_on(ended);
            // What still runs may wait for what does not end.
            runtime.shutdown_background();
        })?;
        Ok(Self { runtime: handle, connection_count: Arc::default(), _running: running })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.connection_count.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_goes_to_who_has_the_fewest() {
        let workers = Workers::start(NonZeroUsize::new(2)).unwrap();
        let [first, second, third] = [(); 3].map(|()| workers.seat());
        assert_ne!(first.runtime.id(), second.runtime.id());
        let freed = second.runtime.id();
        drop(second);
        assert_eq!(workers.seat().runtime.id(), freed, "it has none, and the other two");
        drop((first, third));
    }

    #[test]
    fn each_has_a_thread_of_its_own_which_ends_with_them() {
        let workers = Workers::start(NonZeroUsize::new(2)).unwrap();
        let (ended, is_ended) = std::sync::mpsc::channel::<()>();
        let seats = [workers.seat(), workers.seat()];
        let threads = seats.each_ref().map(|seat| {
            let (id, ended) = (oneshot::channel(), ended.clone());
            seat.runtime.spawn(async move {
                let _ended = ended;
                let _ = id.0.send(thread::current().id());
                std::future::pending::<()>().await;
            });
            id.1.blocking_recv().unwrap()
        });
        assert_ne!(threads[0], threads[1]);
        assert!(threads.iter().all(|it| *it != thread::current().id()));
        drop((workers, ended));
        // Both tasks are gone once there is nobody left who could send.
        assert!(is_ended.recv().is_err());
    }
}
