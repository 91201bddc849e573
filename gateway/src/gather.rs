//! Many reads of rows, few questions: reads of one view that come while a question to the database is
//! under way are asked together by the next one, and reads of one row share an answer.
//!
//! Nobody waits for company: a read that finds a question free to ask asks it at once.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use process::postgres::AtHand;
use projection::sql::{GatheredColumns, RowAnswer};
use sqlx::AssertSqlSafe;
use tokio::sync::{Semaphore, oneshot};
use tokio_util::task::TaskTracker;

use crate::read_models::QueryError;

/// Bounds of gathering.
#[derive(Debug, Clone, Copy)]
pub struct GatherBounds {
    /// Questions of one view under way at once.
    pub queries_max: usize,
    /// Rows that one question asks for.
    pub keys_max: usize,
    /// For one question.
    pub timeout: Duration,
}

/// The reads of one row view.
#[derive(Debug)]
pub struct Line {
    statement: Arc<str>,
    bounds: GatherBounds,
    state: Mutex<State>,
}

/// What a read came to.
#[derive(Debug, Clone)]
pub struct Gathered {
    /// What was found.
    pub answer: Arc<RowAnswer>,
    /// As given by whoever asked for the row first.
    pub moment: u64,
    /// The question was under way already: its snapshot may be older than the read.
    pub is_late: bool,
}

type Reply = Result<Gathered, Arc<QueryError>>;

#[derive(Debug, Default)]
struct State {
    /// Rows to be asked for, in the order they came.
    queue: VecDeque<Arc<str>>,
    waiting: HashMap<Arc<str>, Asked>,
    /// Rows that are being asked for, a map for each question.
    flights: Vec<(u64, HashMap<Arc<str>, Asked>)>,
    next_flight: u64,
}

#[derive(Debug)]
struct Asked {
    partition: i32,
    moment: u64,
    readers: Vec<Reader>,
}

#[derive(Debug)]
struct Reader {
    reply: oneshot::Sender<Reply>,
    is_late: bool,
}

/// The rows of one question.
struct Flight {
    id: u64,
    ids: Vec<Arc<str>>,
    partitions: Vec<i32>,
}

impl Line {
    /// `statement` reads many rows, as [`projection::sql::RowStatements::read_many`] does.
    pub fn new(statement: Arc<str>, bounds: GatherBounds) -> Self {
        Self { statement, bounds, state: Mutex::default() }
    }

    /// Reads the row of the aggregate with this id. With `join`, an answer that is under way already
    /// will do.
    pub async fn read(
        self: &Arc<Self>,
        ask: &Asker,
        partition: i32,
        id: &str,
        moment: u64,
        join: bool,
    ) -> Result<Gathered, QueryError> {
        let (reply, replied) = oneshot::channel();
        let flight = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.enter(partition, id, moment, reply, join);
            state.take_off(&self.bounds)
        };
        if let Some(flight) = flight {
            // Its own task: who asked may hang up, and others wait for the answer.
            ask.flights.spawn(Arc::clone(self).fly(ask.clone(), flight));
        }
        match replied.await {
            Ok(reply) => reply.map_err(QueryError::Gathered),
            // The process is ending.
            Err(_) => Err(QueryError::TimedOut),
        }
    }

    /// Asks one question, and the next as long as there are rows to be asked for.
    async fn fly(self: Arc<Self>, ask: Asker, flight: Flight) {
        let mut next = Some(flight);
        while let Some(flight) = next.take() {
            let asking = tokio::time::timeout(self.bounds.timeout, ask.rows(&self, &flight));
            let answers = asking.await.unwrap_or(Err(QueryError::TimedOut));
            let (asked, following) = {
                let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                let asked = state.land(flight.id);
                (asked, state.take_off(&self.bounds))
            };
            next = following;
            answer(&flight, asked, answers);
        }
    }
}

/// What it takes to ask the database.
#[derive(Debug, Clone)]
pub struct Asker {
    /// Its connections.
    pub connections: AtHand,
    /// Questions at once, of all kinds.
    pub queries: Arc<Semaphore>,
    /// Gathered questions under way.
    pub flights: TaskTracker,
}

impl Asker {
    async fn rows(
        &self,
        line: &Line,
        flight: &Flight,
    ) -> Result<Vec<Option<RowAnswer>>, QueryError> {
        let _permit = self.queries.acquire().await.expect("the semaphore is never closed");
        let rows = match self.columns(line, flight).await {
            // The server was restarted under a pooled connection: another one may well do.
            Err(error) if error.is_lost_connection() => {
                self.connections.forget();
                self.columns(line, flight).await?
            }
            rows => rows?,
        };
        let mut answers = Vec::new();
        answers.resize_with(flight.ids.len(), || None);
        for row in rows {
            let (place, answer) = RowAnswer::from_gathered(row)?;
            if let Some(slot) = answers.get_mut(place) {
                *slot = Some(answer);
            }
        }
        Ok(answers)
    }

    async fn columns(
        &self,
        line: &Line,
        flight: &Flight,
    ) -> Result<Vec<GatheredColumns>, QueryError> {
        let ids: Vec<&str> = flight.ids.iter().map(|id| &**id).collect();
        let mut connection = self.connections.take().await?;
        let rows = sqlx::query_as(AssertSqlSafe(Arc::clone(&line.statement)))
            .bind(&flight.partitions)
            .bind(&ids)
            .fetch_all(&mut *connection)
            .await?;
        connection.keep();
        Ok(rows)
    }
}

impl State {
    fn enter(
        &mut self,
        partition: i32,
        id: &str,
        moment: u64,
        reply: oneshot::Sender<Reply>,
        join: bool,
    ) {
        if let Some(asked) = self.waiting.get_mut(id) {
            asked.readers.push(Reader { reply, is_late: false });
            return;
        }
        let flying = self.flights.iter_mut().rev().find_map(|(_, asked)| asked.get_mut(id));
        if let (Some(asked), true) = (flying, join) {
            asked.readers.push(Reader { reply, is_late: true });
            return;
        }
        let id: Arc<str> = id.into();
        let readers = vec![Reader { reply, is_late: false }];
        self.waiting.insert(Arc::clone(&id), Asked { partition, moment, readers });
        self.queue.push_back(id);
    }

    /// The rows of the next question, when one may be asked and somebody still wants to know.
    fn take_off(&mut self, bounds: &GatherBounds) -> Option<Flight> {
        if bounds.queries_max <= self.flights.len() {
            return None;
        }
        let id = self.next_flight;
        let mut flight = Flight { id, ids: Vec::new(), partitions: Vec::new() };
        let mut flying = HashMap::new();
        while flight.ids.len() < bounds.keys_max {
            let Some(row) = self.queue.pop_front() else { break };
            let Some(asked) = self.waiting.remove(&row) else { continue };
            // Whoever hung up does not want to know.
            if asked.readers.iter().all(|reader| reader.reply.is_closed()) {
                continue;
            }
            flight.partitions.push(asked.partition);
            flight.ids.push(Arc::clone(&row));
            flying.insert(row, asked);
        }
        if flight.ids.is_empty() {
            return None;
        }
        self.next_flight += 1;
        self.flights.push((id, flying));
        Some(flight)
    }

    fn land(&mut self, flight: u64) -> HashMap<Arc<str>, Asked> {
        let place = self.flights.iter().position(|(id, _)| *id == flight);
        place.map(|place| self.flights.swap_remove(place).1).unwrap_or_default()
    }
}

/// Tells everybody. One who hung up meanwhile does not miss it.
fn answer(
    flight: &Flight,
    mut asked: HashMap<Arc<str>, Asked>,
    answers: Result<Vec<Option<RowAnswer>>, QueryError>,
) {
    let answers = match answers {
        Ok(answers) => answers,
        Err(error) => {
            let error = Arc::new(error);
            for reader in asked.into_values().flat_map(|asked| asked.readers) {
                let _ = reader.reply.send(Err(Arc::clone(&error)));
            }
            return;
        }
    };
    for (id, answer) in flight.ids.iter().zip(answers) {
        // The statement gives a row for each; without one nobody is told anything.
        let (Some(asked), Some(answer)) = (asked.remove(id), answer) else { continue };
        let (answer, moment) = (Arc::new(answer), asked.moment);
        for Reader { reply, is_late } in asked.readers {
            let _ = reply.send(Ok(Gathered { answer: Arc::clone(&answer), moment, is_late }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: GatherBounds =
        GatherBounds { queries_max: 1, keys_max: 2, timeout: Duration::from_secs(1) };

    fn enter(state: &mut State, id: &str, join: bool) -> oneshot::Receiver<Reply> {
        let (reply, replied) = oneshot::channel();
        state.enter(0, id, 7, reply, join);
        replied
    }

    fn ids(flight: Option<Flight>) -> Vec<String> {
        flight.map_or_else(Vec::new, |flight| flight.ids.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn reads_that_come_during_a_question_are_asked_together_by_the_next() {
        let mut state = State::default();
        let _first = enter(&mut state, "a", true);
        assert_eq!(ids(state.take_off(&BOUNDS)), ["a"], "nobody waits for company");
        let _others = ["b", "c", "b", "d"].map(|id| enter(&mut state, id, true));
        assert_eq!(ids(state.take_off(&BOUNDS)), [""; 0], "as many are asked as may");
        assert_eq!(state.land(0).len(), 1);
        assert_eq!(ids(state.take_off(&BOUNDS)), ["b", "c"]);
        assert_eq!(state.land(1)["b"].readers.len(), 2, "one row, two readers");
        assert_eq!(ids(state.take_off(&BOUNDS)), ["d"]);
        state.land(2);
        assert!(state.waiting.is_empty() && state.queue.is_empty() && state.flights.is_empty());
    }

    #[test]
    fn a_read_joins_a_question_under_way_only_if_it_wants_to_and_is_told() {
        let mut state = State::default();
        let _first = enter(&mut state, "a", true);
        let flight = state.take_off(&BOUNDS).unwrap();
        let mut joined = enter(&mut state, "a", true);
        let _fresh = enter(&mut state, "a", false);
        assert_eq!(state.queue.len(), 1, "who must know the newest asks again");
        let nothing =
            RowAnswer { active_version: Some(1), checkpoint: None, parked: None, row: None };
        let asked = state.land(flight.id);
        answer(&flight, asked, Ok(vec![Some(nothing)]));
        assert!(joined.try_recv().unwrap().unwrap().is_late);
    }

    #[test]
    fn rows_that_nobody_waits_for_any_more_are_not_asked_for() {
        let mut state = State::default();
        drop(enter(&mut state, "a", true));
        let _waits = enter(&mut state, "b", true);
        assert_eq!(ids(state.take_off(&BOUNDS)), ["b"]);
        assert!(state.waiting.is_empty());
    }
}
