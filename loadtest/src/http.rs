//! A client that costs little, since it shares the machine with what it measures: requests are made of
//! bytes, and of an answer only what is asked for is looked at.

use std::net::SocketAddr;

use anyhow::{Context as _, bail, ensure};
use memchr::memmem;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// Answers are small: one read takes them whole.
const READ_BYTES: usize = 16 * 1024;

/// A connection that stays, with one request under way at a time.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

/// An answer as it came.
#[derive(Debug, Clone, Copy)]
pub struct Answer<'a> {
    /// Its status.
    pub status: u16,
    head: &'a [u8],
    /// Its body.
    pub body: &'a [u8],
}

impl Connection {
    /// Connects.
    pub async fn open(address: SocketAddr) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address).await.context("could not connect")?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, buffer: Vec::with_capacity(READ_BYTES) })
    }

    /// So many connections.
    pub async fn open_many(address: SocketAddr, count: usize) -> anyhow::Result<Vec<Self>> {
        let mut connections = Vec::with_capacity(count);
        for _ in 0..count {
            connections.push(Self::open(address).await?);
        }
        Ok(connections)
    }

    /// Sends a request and waits for its answer, whose body has a `content-length`.
    pub async fn exchange(&mut self, request: &[u8]) -> anyhow::Result<Answer<'_>> {
        self.buffer.clear();
        self.stream.write_all(request).await?;
        loop {
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                bail!("the connection was closed");
            }
            if let Some(end) = self.complete()? {
                let (head, body) = self.buffer.split_at(end);
                return Ok(Answer { status: status(head)?, head, body });
            }
        }
    }

    /// Where the body begins, once all of it is there.
    fn complete(&self) -> anyhow::Result<Option<usize>> {
        let Some(end) = memmem::find(&self.buffer, b"\r\n\r\n").map(|at| at + 4) else {
            return Ok(None);
        };
        let length = header(&self.buffer[..end], "content-length").unwrap_or("0");
        let length: usize = length.parse().context("the answer's length is no number")?;
        ensure!(self.buffer.len() <= end + length, "more than one answer came");
        Ok((self.buffer.len() == end + length).then_some(end))
    }
}

impl<'a> Answer<'a> {
    /// A header, by its name in lower case.
    pub fn header(&self, name: &str) -> Option<&'a str> {
        header(self.head, name)
    }

    /// All headers, names in lower case.
    pub fn headers(&self) -> impl Iterator<Item = (String, String)> + 'a {
        let head = String::from_utf8_lossy(self.head);
        let lines: Vec<_> = head
            .lines()
            .skip(1)
            .filter_map(|line| line.split_once(": "))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
            .collect();
        lines.into_iter()
    }

    /// Refuses what is not a success.
    pub fn succeeded(self) -> anyhow::Result<Self> {
        let Self { status, body, .. } = self;
        ensure!((200..300).contains(&status), "{status}: {}", String::from_utf8_lossy(body));
        Ok(self)
    }
}

fn status(head: &[u8]) -> anyhow::Result<u16> {
    let digits = head.get(9..12).and_then(|digits| std::str::from_utf8(digits).ok());
    digits.and_then(|digits| digits.parse().ok()).context("the answer has no status")
}

fn header<'a>(head: &'a [u8], name: &str) -> Option<&'a str> {
    let mut rest = head;
    while let Some(end) = memmem::find(rest, b"\r\n") {
        let (line, next) = rest.split_at(end);
        rest = &next[2..];
        let Some((given, value)) = line.split_at_checked(name.len()) else { continue };
        if given.eq_ignore_ascii_case(name.as_bytes()) && value.first() == Some(&b':') {
            return std::str::from_utf8(&value[1..]).ok().map(str::trim);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn an_answer_that_comes_in_pieces_is_put_together() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 4];
            stream.read_exact(&mut request).await.unwrap();
            for piece in ["HTTP/1.1 201 Created\r\nConte", "nt-Length: 5\r\nA: b\r\n\r\nhe", "llo"]
            {
                stream.write_all(piece.as_bytes()).await.unwrap();
                stream.flush().await.unwrap();
                tokio::task::yield_now().await;
            }
            stream
        });
        let mut connection = Connection::open(address).await.unwrap();
        let answer = connection.exchange(b"GET ").await.unwrap();
        assert_eq!((answer.status, answer.body), (201, &b"hello"[..]));
        assert_eq!((answer.header("a"), answer.header("content-lengt")), (Some("b"), None));
        assert!(answer.succeeded().is_ok());
        server.await.unwrap();
    }
}
