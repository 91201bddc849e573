//! Free ports that stay free until their server listens.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Mutex;

use tokio::net::TcpSocket;

use crate::Error;

/// Below the range Linux gives to outgoing connections, so that no client takes a port between choice and use.
const FIRST: u16 = 20_000;
const LAST: u16 = 31_999;

/// The locks of the ports this process chose. They go with the process, as do the servers it started.
static HELD: Mutex<Vec<File>> = Mutex::new(Vec::new());

/// A loopback port nobody listens on, which no other process using this function is given while this one lives.
///
/// A port that is bound to be found and then released can be found by two processes before either listens. So a port
/// is also a locked file: the system drops the lock with the process, however it ends.
pub fn free() -> Result<u16, Error> {
    let dir = lock_dir()?;
    let span = u32::from(LAST - FIRST) + 1;
    // Processes begin at different places, so that they seldom meet.
    let start = std::process::id().wrapping_mul(61) % span;
    for step in 0..span {
        let offset =
            u16::try_from((start + step) % span).expect("the range has fewer than 2^16 ports");
        let port = FIRST + offset;
        if reserve(&dir, port) {
            return Ok(port);
        }
    }
    Err(Error::NoFreePort { first: FIRST, last: LAST })
}

/// `N` ports at once, for a server with several listeners.
pub fn free_many<const N: usize>() -> Result<[u16; N], Error> {
    let mut ports = [0; N];
    for port in &mut ports {
        *port = free()?;
    }
    Ok(ports)
}

/// Locks of different users live in different folders: the port itself still tells them apart when it is bound.
fn lock_dir() -> Result<PathBuf, Error> {
    let user = rustix::process::getuid().as_raw();
    let dir = std::env::temp_dir().join(format!("tidemark-ports-{user}"));
    std::fs::create_dir_all(&dir).map_err(Error::io(format!("create {}", dir.display())))?;
    Ok(dir)
}

fn reserve(dir: &std::path::Path, port: u16) -> bool {
    let Ok(lock) = File::create(dir.join(port.to_string())) else { return false };
    if lock.try_lock().is_err() || probe(port).is_err() {
        return false;
    }
    HELD.lock().expect("no holder of the list can panic").push(lock);
    true
}

/// Binds the port, without listening: a program that another thread starts at this moment has the socket for as long
/// as it takes to become that program, and must not keep the port from its server.
fn probe(port: u16) -> std::io::Result<TcpSocket> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(SocketAddr::from((Ipv4Addr::LOCALHOST, port)))?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_port_that_is_still_being_looked_at_can_be_listened_on() {
        let port = free().unwrap();
        let _looking = probe(port).unwrap();
        TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
    }

    #[test]
    fn a_port_is_given_once_and_can_be_bound() {
        let ports: [u16; 50] = free_many().unwrap();
        let distinct: std::collections::BTreeSet<u16> = ports.into_iter().collect();
        assert_eq!(distinct.len(), ports.len());
        for port in ports {
            TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
        }
    }

    #[test]
    fn a_port_somebody_listens_on_is_not_given() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let dir = lock_dir().unwrap();
        assert!(!reserve(&dir, port));
    }
}
