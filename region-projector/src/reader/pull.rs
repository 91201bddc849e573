//! A pull loop of our own on the region's stream.
//!
//! The checkpoint lives in the database, so the consumer is ephemeral and acknowledges nothing: it is
//! made anew at any position. The client's own message stream is not used, since it takes half a
//! minute to notice a lost request and raises false alarms while the application is busy.

use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::consumer::pull::{BatchConfig, Config};
use async_nats::jetstream::consumer::{AckPolicy, Consumer, DeliverPolicy};
use async_nats::jetstream::{self, Context};
use async_nats::{HeaderName, Message, StatusCode, Subject, Subscriber};
use consistency::{Event, Position};
use futures::{FutureExt, StreamExt};
use tokio::time::timeout;

use super::bytes_of;

/// A request waits this long at the server before it is asked again.
const EXPIRES: Duration = Duration::from_secs(5);
/// The server says that it is there this often while it has nothing else to say.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Silence that means the request, or the server, is lost.
const SILENCE_MAX: Duration = Duration::from_secs(3);
/// The server forgets a consumer that nobody asks for this long.
const INACTIVE_MAX: Duration = Duration::from_secs(30);
/// Messages that an ended request still lacked.
const PENDING_HEADER: &str = "Nats-Pending-Messages";
/// The deadline of a request to the server's API.
const REQUEST_MAX: Duration = Duration::from_secs(5);

/// Why the stream cannot be read on; a new pull has to be opened.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The consumer could not be made.
    #[error("cannot make a consumer")]
    Consumer(#[from] jetstream::stream::ConsumerError),
    /// The inbox could not be subscribed.
    #[error("cannot subscribe")]
    Subscribe(#[from] async_nats::SubscribeError),
    /// The request could not be sent.
    #[error("cannot ask for messages")]
    Request(#[from] jetstream::consumer::pull::BatchRequestError),
    /// The API did not answer.
    #[error("the server did not answer in time")]
    Deadline,
    /// The server ended the request.
    #[error("the server ended the request: {status} {description}")]
    Ended {
        /// Its status.
        status: StatusCode,
        /// Its words.
        description: String,
    },
    /// Neither message nor heartbeat.
    #[error("the server is silent")]
    Silent,
    /// The connection was closed for good.
    #[error("the connection is closed")]
    Closed,
    /// A message that does not come from a stream.
    #[error("a message has no place in a stream")]
    Stray,
    /// Whoever reads for all has ended.
    #[error("the stream is not read any more")]
    Over,
}

/// One message of the stream. Cheap to clone.
#[derive(Debug, Clone)]
pub enum Read {
    /// An event in its place.
    Event(Arc<Event>),
    /// Something that is not the event of its place. The log knows what belongs there.
    Unreadable {
        /// Its place in the stream.
        position: Position,
        /// What is wrong with it; a closed set of texts.
        reason: String,
    },
}

impl Read {
    /// Its place in the stream.
    pub fn position(&self) -> Position {
        match self {
            Self::Event(event) => event.at.position,
            Self::Unreadable { position, .. } => *position,
        }
    }

    /// What it takes of memory, nearly.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Event(event) => bytes_of(event),
            Self::Unreadable { reason, .. } => size_of::<Self>() + reason.len(),
        }
    }
}

/// A consumer and its requests.
pub struct Pull {
    context: Context,
    consumer: Consumer<Config>,
    inbox: Subject,
    messages: Subscriber,
    bounds: Bounds,
    /// Messages asked for and not yet received.
    wanted: usize,
    /// Whether anything has come since the last request.
    met: bool,
    /// The next message is larger than a request may bring.
    is_large: bool,
    head: Position,
    /// Messages that the stream had after the last one that was taken, when the server sent that.
    pending: u64,
}

/// A stream, and how it is asked.
#[derive(Clone)]
pub struct Stream {
    /// The region's server.
    pub context: Context,
    /// Its name.
    pub name: String,
    /// What one request brings at most.
    pub bounds: Bounds,
}

/// What one request brings at most.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Messages.
    pub batch: usize,
    /// Their bytes together, unless it is a single message.
    pub bytes_max: usize,
}

impl Pull {
    /// Reads on after `after`.
    pub async fn open(stream: &Stream, after: Position) -> Result<Self, PullError> {
        let Stream { context, name, bounds } = stream;
        let config = Config {
            deliver_policy: DeliverPolicy::ByStartSequence { start_sequence: after.next().get() },
            ack_policy: AckPolicy::None,
            inactive_threshold: INACTIVE_MAX,
            memory_storage: true,
            num_replicas: 1,
            ..Config::default()
        };
        let made = timeout(REQUEST_MAX, context.create_consumer_on_stream(config, name));
        let consumer = made.await.map_err(|_| PullError::Deadline)??;
        let client = context.client();
        let inbox = Subject::from(client.new_inbox());
        let messages = client.subscribe(inbox.clone()).await?;
        let pending = consumer.cached_info().num_pending;
        let (context, bounds) = (context.clone(), *bounds);
        let (wanted, met, is_large, head) = (0, true, false, after);
        let pull = Self {
            context,
            consumer,
            inbox,
            messages,
            bounds,
            wanted,
            met,
            is_large,
            head,
            pending,
        };
        Ok(pull)
    }

    /// Whether the stream had nothing more, when the server last said.
    pub fn is_at_end(&self) -> bool {
        self.pending == 0
    }

    /// The last position of the stream, as far as the server has said.
    pub fn head(&self) -> Position {
        self.head
    }

    /// Waits until something has arrived, and takes what has, at most one batch, in stream order.
    /// Nothing when the server has only said that it is there. Cancelling loses nothing.
    pub async fn next(&mut self) -> Result<Vec<Read>, PullError> {
        self.ask().await?;
        let waited = timeout(SILENCE_MAX, self.messages.next()).await;
        let message = waited.map_err(|_| PullError::Silent)?.ok_or(PullError::Closed)?;
        let mut arrived: Vec<Read> = self.take(message)?.into_iter().collect();
        while arrived.len() < self.bounds.batch
            && let Some(Some(message)) = self.messages.next().now_or_never()
        {
            arrived.extend(self.take(message)?);
        }
        Ok(arrived)
    }

    /// Asks again when half of what was asked for has come, so that the server never waits for us.
    async fn ask(&mut self) -> Result<(), PullError> {
        if self.wanted > self.bounds.batch / 2 {
            return Ok(());
        }
        let Bounds { batch, bytes_max } = self.bounds;
        let (batch, max_bytes) = if self.is_large { (1, 0) } else { (batch, bytes_max) };
        let request = BatchConfig {
            batch,
            max_bytes,
            expires: Some(EXPIRES),
            idle_heartbeat: HEARTBEAT,
            ..BatchConfig::default()
        };
        self.consumer.request_batch(request, self.inbox.clone()).await?;
        self.wanted += batch;
        (self.met, self.is_large) = (false, false);
        Ok(())
    }

    fn take(&mut self, message: Message) -> Result<Option<Read>, PullError> {
        match message.status {
            None | Some(StatusCode::OK) => {
                self.wanted = self.wanted.saturating_sub(1);
                self.met = true;
                self.read(message).map(Some)
            }
            Some(StatusCode::IDLE_HEARTBEAT) => Ok(None),
            Some(StatusCode::TIMEOUT | StatusCode::NOT_FOUND) => {
                self.wanted = self.wanted.saturating_sub(self.unmet(&message));
                Ok(None)
            }
            Some(status) => {
                let description = message.description.as_deref().unwrap_or_default();
                let is_conflict = status == StatusCode::REQUEST_TERMINATED;
                // It has brought all its messages, and could have brought more bytes.
                if is_conflict && description == "Batch Completed" {
                    return Ok(None);
                }
                // The next message would bring more bytes than were asked for.
                if is_conflict && description.contains("Exceeds MaxBytes") {
                    self.wanted = self.wanted.saturating_sub(self.unmet(&message));
                    self.is_large = !self.met;
                    return Ok(None);
                }
                Err(PullError::Ended { status, description: description.to_owned() })
            }
        }
    }

    /// What the request still lacked, and does not come any more.
    fn unmet(&self, message: &Message) -> usize {
        let pending = message.headers.as_ref().and_then(|headers| headers.get(PENDING_HEADER));
        let pending = pending.and_then(|pending| pending.as_str().parse().ok());
        pending.unwrap_or(self.bounds.batch)
    }

    fn read(&mut self, message: Message) -> Result<Read, PullError> {
        let message = jetstream::Message { message, context: self.context.clone() };
        let info = message.info().map_err(|_| PullError::Stray)?;
        let position = Position::new(info.stream_sequence).ok_or(PullError::Stray)?;
        self.pending = info.pending;
        self.head = self.head.max(position.plus(info.pending));
        let headers = message.message.headers.unwrap_or_default();
        // Looked up by a string, each of an event's headers would be checked and copied for that.
        let find = |name: &'static str| {
            headers.get(HeaderName::from_static(name)).map(|value| value.as_str())
        };
        let read = match Event::from_message(find, message.message.payload.into()) {
            Ok(event) if event.at.position == position => Read::Event(Arc::new(event)),
            Ok(_) => Read::Unreadable { position, reason: "is of another position".to_owned() },
            Err(error) => Read::Unreadable { position, reason: error.to_string() },
        };
        Ok(read)
    }
}
