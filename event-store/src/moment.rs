//! A `timestamptz` as Postgres sends it: to say it in microseconds since 1970 costs as much as to read the row.

use consistency::CommittedAt;
use sqlx::error::BoxDynError;
use sqlx::postgres::types::Oid;
use sqlx::postgres::{PgTypeInfo, PgValueFormat, PgValueRef};
use sqlx::{Decode, Postgres, Type};

const TIMESTAMPTZ: Oid = Oid(1184);
/// What Postgres counts from, 2000-01-01, counted from 1970.
const ORIGIN_MICROS: i64 = 946_684_800_000_000;

/// When an event was committed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moment(pub CommittedAt);

impl Type<Postgres> for Moment {
    fn type_info() -> PgTypeInfo {
        PgTypeInfo::with_oid(TIMESTAMPTZ)
    }
}

impl Decode<'_, Postgres> for Moment {
    fn decode(value: PgValueRef<'_>) -> Result<Self, BoxDynError> {
        if value.format() != PgValueFormat::Binary {
            return Err("a moment comes in binary".into());
        }
        let micros = i64::from_be_bytes(value.as_bytes()?.try_into()?);
        let micros = micros.checked_add(ORIGIN_MICROS).ok_or("a moment beyond all clocks")?;
        Ok(Self(CommittedAt::from_unix_micros(micros)))
    }
}
