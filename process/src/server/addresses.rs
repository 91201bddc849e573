//! How many connections each address has.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};

/// Addresses with connections, each with their number.
#[derive(Debug, Clone, Default)]
pub struct Addresses(Arc<Mutex<HashMap<IpAddr, usize>>>);

/// One connection of an address.
#[derive(Debug)]
pub struct Place {
    addresses: Addresses,
    address: IpAddr,
}

impl Addresses {
    /// A place for one more connection of `address`; `None` when it has `max`.
    pub fn take(&self, address: IpAddr, max: usize) -> Option<Place> {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(address).or_default();
        if max <= *count {
            return None;
        }
        *count += 1;
        Some(Place { addresses: self.clone(), address })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.addresses.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_takes_no_more_places_than_it_may_and_gives_them_back() {
        let addresses = Addresses::default();
        let (one, other) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let first = addresses.take(one, 2).unwrap();
        let second = addresses.take(one, 2).unwrap();
        assert!(addresses.take(one, 2).is_none());
        assert!(addresses.take(other, 2).is_some());
        drop(first);
        assert!(addresses.take(one, 2).is_some());
        drop(second);
        assert!(addresses.0.lock().unwrap().is_empty(), "nobody is remembered for nothing");
    }
}
