//! Rows that lack a field which their view has got later, and how they get it.

use std::sync::Arc;

use crate::{ProjectionDefinition, ViewKind};

/// A row of [`BackfillStatements::page`]: list key (empty in views without), created position (zero there),
/// aggregate id.
pub type LackingColumns = (String, i64, String);

/// The statements of one view.
#[derive(Debug, Clone)]
pub struct BackfillStatements {
    /// The place of the view among the definition's.
    pub view_index: usize,
    /// One row of one `bigint`: how many rows lack a field.
    pub count: Arc<str>,
    /// `$1 text`, `$2 bigint`, `$3 text`: the row that the page begins after, as in [`LackingColumns`]; `$4
    /// bigint`: most rows. Rows that lack a field, in the order of the table's key.
    pub page: Arc<str>,
    /// `$1 text[]`, `$2 bigint[]`, `$3 text[]`: rows. Those that still lack a field: [`LackingColumns`] and
    /// the JSON that they have.
    pub lacking: Arc<str>,
    /// The same, and `$4 text[]`: the JSON that they get.
    pub fill: Arc<str>,
}

impl BackfillStatements {
    /// Of every view with later fields.
    pub fn all(definition: &ProjectionDefinition) -> Vec<Self> {
        let tables = definition.statements().tables().skip(1);
        let views = definition.views().iter().enumerate().zip(tables);
        let views = views.filter(|((_, view), _)| !view.later_fields().is_empty());
        let all = views.filter_map(|((view_index, view), table)| {
            let absent = view.later_fields().iter().map(|field| {
                let name = field.name();
                format!("line.data->'{name}' is null")
            });
            let absent: Vec<String> = absent.collect();
            let lacks = format!("json_typeof(line.data) = 'object' and ({})", absent.join(" or "));
            let key = match view.kind() {
                ViewKind::Row | ViewKind::Search(_) => ["''", "0", "line.aggregate_id"],
                ViewKind::List => ["line.list_key", "line.created_position", "line.aggregate_id"],
                ViewKind::Rollup => return None,
            };
            Some(Self::new(view_index, table, key, &lacks))
        });
        all.collect()
    }

    fn new(view_index: usize, table: &str, key: [&str; 3], lacks: &str) -> Self {
        let listed = format!("{}::text, {}::bigint, {}", key[0], key[1], key[2]);
        let order = key.iter().filter(|column| column.starts_with("line."));
        let order = order.copied().collect::<Vec<_>>().join(", ");
        let given = |more: &str| format!("unnest($1::text[], $2::bigint[], $3::text[]{more})");
        let is_it = format!(
            "{} = given.list_key and {} = given.created_position and {} = given.aggregate_id",
            key[0], key[1], key[2]
        );
        // A row comparison of the whole key walks the index of a list; in other views the key is the id.
        let after = match key[0] {
            "''" => "line.aggregate_id > $3 and ($1::text is null or $2::bigint is not null)",
            _ => {
                "(line.list_key, line.created_position, line.aggregate_id) > ($1::text, $2::bigint, $3)"
            }
        };
        Self {
            view_index,
            count: format!(r#"select count(*) from "{table}" as line where {lacks}"#).into(),
            page: format!(
                r#"select {listed} from "{table}" as line where {after} and {lacks}
                order by {order} limit $4"#
            )
            .into(),
            lacking: format!(
                r#"select {listed}, line.data::text from "{table}" as line
                join {} as given (list_key, created_position, aggregate_id) on {is_it}
                where {lacks}"#,
                given("")
            )
            .into(),
            fill: format!(
                r#"update "{table}" as line set data = given.data::json
                from {} as given (list_key, created_position, aggregate_id, data)
                where {is_it} and {lacks}"#,
                given(", $4::text[]")
            )
            .into(),
        }
    }
}
