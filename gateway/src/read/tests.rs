use http::Request;
use hyper::body::Incoming;

use super::*;
use crate::{auth::Admitted, service::Service};

/// What the future that a function makes takes. It is not called.
const fn future_bytes<A, F: Future>(_: &impl FnOnce(A) -> F) -> usize {
    size_of::<F>()
}

/// Thousands may wait, and each holds room for all that it might do next.
#[test]
fn a_read_that_waits_takes_little_room() {
    let reading = |read: &'static mut Read<'static>| read.run();
    let bytes = future_bytes(&reading);
    assert!(bytes <= 2048, "a read that is not answered at once has {bytes} bytes");
    let answering =
        |(service, request): (Service, Request<Admitted<Incoming>>)| service.answer(request);
    let bytes = future_bytes(&answering);
    assert!(bytes <= 4096, "a request has {bytes} bytes");
}
