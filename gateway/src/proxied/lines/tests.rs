use std::collections::VecDeque;

use http::{HeaderValue, Method, header};
use http_body_util::BodyExt as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    sync::mpsc::{self, UnboundedReceiver},
};

use super::*;

const WHOLE: &str = "HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ntide";
const EMPTY: &str = "HTTP/1.1 204 No Content\r\n\r\n";
const CHUNKED: &str =
    "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nti\r\n2\r\nde\r\n0\r\n\r\n";
const HALF: &str = "HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nti";

/// What a service does with a request.
#[derive(Clone, Copy)]
enum Reaction {
    Answer(&'static str),
    AnswerAndClose(&'static str),
    Close,
}

fn post(body: Body) -> Request<Body> {
    let mut request = Request::new(body);
    *request.method_mut() = Method::POST;
    *request.uri_mut() = Uri::from_static("/notes");
    request.headers_mut().insert(header::HOST, HeaderValue::from_static("notes"));
    request
}

/// A service that reacts as told, request by request, on whichever connection.
struct Script {
    lines: Lines,
    /// The number of the connection, for each request and, negative, for each one closed by its caller.
    seen: UnboundedReceiver<i64>,
}

impl Script {
    async fn of(reactions: &[Reaction]) -> Script {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}/", listener.local_addr().unwrap());
        let left = Arc::new(Mutex::new(VecDeque::from(reactions.to_vec())));
        let (see, seen) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            for nth in 1.. {
                let (mut stream, _) = listener.accept().await.unwrap();
                let (left, see) = (Arc::clone(&left), see.clone());
                tokio::spawn(async move {
                    let mut request = [0; 1024];
                    // Requests here are small enough to come at once.
                    while 0 < stream.read(&mut request).await.unwrap_or(0) {
                        see.send(nth).unwrap();
                        let reaction = left.lock().unwrap().pop_front().expect("no more requests");
                        match reaction {
                            Reaction::Close => return,
                            Reaction::Answer(text) => {
                                stream.write_all(text.as_bytes()).await.unwrap();
                            }
                            Reaction::AnswerAndClose(text) => {
                                stream.write_all(text.as_bytes()).await.unwrap();
                                return;
                            }
                        }
                    }
                    see.send(-nth).unwrap();
                });
            }
        });
        Script { lines: Lines::new(address.parse().unwrap(), Duration::from_secs(5)), seen }
    }

    async fn ask(&self) -> Result<Response<Answered>, LineError> {
        self.lines.send(post(Body::from(Bytes::from("high water?")))).await
    }

    async fn answer(&self) -> String {
        let body = self.ask().await.unwrap().into_body().collect().await.unwrap();
        String::from_utf8(body.to_bytes().to_vec()).unwrap()
    }

    async fn saw(&mut self, count: usize) -> Vec<i64> {
        let mut saw = Vec::new();
        for _ in 0..count {
            saw.push(self.seen.recv().await.unwrap());
        }
        saw
    }
}

#[tokio::test]
async fn a_line_is_used_again_once_its_answer_is_over() {
    let answers = [WHOLE, CHUNKED, EMPTY, WHOLE, WHOLE, WHOLE];
    let mut service = Script::of(&answers.map(Reaction::Answer)).await;
    for answer in ["tide", "tide", ""] {
        assert_eq!(service.answer().await, answer);
    }
    // Nobody has to read an answer that has arrived.
    drop(service.ask().await.unwrap());
    let (one, other) = (service.ask().await.unwrap(), service.ask().await.unwrap());
    assert_eq!(service.saw(6).await, [1, 1, 1, 1, 1, 2]);
    for answer in [one, other] {
        assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), "tide");
    }
    assert_eq!(service.lines.idle().lines.len(), 2);
}

#[tokio::test]
async fn a_line_that_its_service_has_closed_is_not_sent_on() {
    let reactions =
        [Reaction::AnswerAndClose(WHOLE), Reaction::AnswerAndClose(EMPTY), Reaction::Answer(WHOLE)];
    let mut service = Script::of(&reactions).await;
    for answer in ["tide", "", "tide"] {
        assert_eq!(service.answer().await, answer);
        // What the service does next has arrived when this turn is over.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(service.saw(3).await, [1, 2, 3], "each arrived once");
}

#[tokio::test]
async fn a_line_that_is_lost_under_way_is_told_and_not_kept() {
    let reactions = [
        Reaction::Close,
        Reaction::AnswerAndClose(HALF),
        Reaction::Answer(HALF),
        Reaction::Answer(WHOLE),
    ];
    let mut service = Script::of(&reactions).await;
    assert!(matches!(service.ask().await, Err(LineError::Lost(_))));
    service.ask().await.unwrap().into_body().collect().await.unwrap_err();
    let mut left = service.ask().await.unwrap().into_body();
    assert_eq!(left.frame().await.unwrap().unwrap().into_data().unwrap(), "ti");
    drop(left);
    assert_eq!(service.saw(4).await, [1, 2, 3, -3]);
    assert_eq!(service.answer().await, "tide");
    assert_eq!(service.saw(1).await, [4]);
}

#[tokio::test]
async fn nobody_to_connect_to_is_told_as_that() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}/", listener.local_addr().unwrap()).parse().unwrap();
    drop(listener);
    let (_, seen) = mpsc::unbounded_channel();
    let nobody = Script { lines: Lines::new(address, Duration::from_secs(5)), seen };
    assert!(matches!(nobody.ask().await, Err(LineError::Connect(_))));
}

#[tokio::test]
async fn idle_lines_are_closed_after_a_while() {
    let mut service = Script::of(&[WHOLE; 2].map(Reaction::Answer)).await;
    assert_eq!(service.answer().await, "tide");
    assert_eq!(service.saw(1).await, [1]);
    tokio::time::pause();
    assert_eq!(service.saw(1).await, [-1]);
    assert_eq!(service.answer().await, "tide");
    assert_eq!(service.saw(1).await, [2]);
}

#[tokio::test]
async fn a_request_is_sent_to_its_end_although_its_answer_is_over() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}/", listener.local_addr().unwrap());
    let heard = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut heard = vec![0; 1024];
        let count = stream.read(&mut heard).await.unwrap();
        heard.truncate(count);
        stream.write_all(WHOLE.as_bytes()).await.unwrap();
        while !heard.ends_with(b"0\r\n\r\n") {
            assert_ne!(stream.read_buf(&mut heard).await.unwrap(), 0, "cut off");
        }
        String::from_utf8(heard).unwrap()
    });
    let (pieces, piece) = mpsc::channel::<Bytes>(1);
    let body = futures::stream::unfold(piece, async |mut piece| {
        let next = piece.recv().await?;
        Some((Ok::<_, crate::body::BodyError>(Frame::data(next)), piece))
    });
    let body = Body::stream(http_body_util::StreamBody::new(body));
    let lines = Lines::new(address.parse().unwrap(), Duration::from_secs(5));
    pieces.send(Bytes::from("first")).await.unwrap();
    let answer = lines.send(post(body)).await.unwrap().into_body().collect().await.unwrap();
    assert_eq!(answer.to_bytes(), "tide");
    pieces.send(Bytes::from("last")).await.unwrap();
    drop(pieces);
    let heard = tokio::time::timeout(Duration::from_secs(30), heard).await.unwrap().unwrap();
    assert!(heard.contains("first") && heard.contains("last"), "{heard}");
}

#[tokio::test]
async fn a_line_is_used_by_the_runtime_that_watches_it() {
    let mut service = Script::of(&[WHOLE; 3].map(Reaction::Answer)).await;
    assert_eq!(service.answer().await, "tide");
    let lines = service.lines.clone();
    let elsewhere = tokio::task::spawn_blocking(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let answer = lines.send(post(Body::from(Bytes::from("low water?")))).await.unwrap();
            answer.into_body().collect().await.unwrap().to_bytes()
        })
    });
    assert_eq!(elsewhere.await.unwrap(), "tide");
    assert_eq!(service.answer().await, "tide");
    assert_eq!(service.saw(3).await, [1, 2, 1]);
}

/// As what is left is when a runtime ends before its tasks do.
#[test]
fn an_answer_dropped_outside_a_runtime_ends_its_connection() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (mut script, answer) = runtime.block_on(async {
        let script = Script::of(&[Reaction::Answer(EMPTY)]).await;
        let answer = script.ask().await.unwrap();
        (script, answer)
    });
    drop(answer);
    assert_eq!(runtime.block_on(script.saw(2)), [1, -1]);
}
