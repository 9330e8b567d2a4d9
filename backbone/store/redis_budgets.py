"""Budgets on Redis (or Valkey): a hash for each budget and period. Amounts are decimal numbers of any unit."""

from __future__ import annotations

from backbone.store import redis_keys as keys
from backbone.store.budgets import LEASE_S, BudgetKey, BudgetReport, BudgetStanding
from backbone.store.redis import RedisStore

EXCHANGE = """
local key = KEYS[1]
local gateway, warn_at, remembered = ARGV[1], tonumber(ARGV[9]), ARGV[10]
local limit, need, wanted, retained = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local jobs, jobs_estimate, noticed = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
local lease_ms = tonumber(ARGV[13])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function text(number) return string.format('%.17g', number) end
local function set(field, number) redis.call('HSET', key, field, text(number)) end

local cut = tonumber(redis.call('HGET', key, 'cut'))
if not cut then
  if remembered == '' then return {} end
  cut = tonumber(ARGV[11])
  set('base', tonumber(remembered))
  set('cut', cut)
end
for i = 14, #ARGV, 2 do
  local minute = math.max(tonumber(ARGV[i]), cut)
  set('m' .. minute, tonumber(redis.call('HGET', key, 'm' .. minute) or 0) + tonumber(ARGV[i + 1]))
end
local mean = tonumber(redis.call('HGET', key, 'mean') or 0)
if jobs > 0 then
  local weight = mean > 0 and jobs / (jobs + 16) or 1
  mean = mean + (jobs_estimate / jobs - mean) * weight
  set('mean', mean)
end

local spent, leased, holders, announced, of = 0, retained, 0, 0, ''
local fields = redis.call('HGETALL', key)
for i = 1, #fields, 2 do
  local field, value = fields[i], fields[i + 1]
  local kind = string.sub(field, 1, 1)
  if field == 'base' or (kind == 'm' and field ~= 'mean') then
    spent = spent + tonumber(value)
  elseif field == 'noticed' then
    announced = tonumber(value)
  elseif field == 'noticed-of' then
    of = value
  elseif kind == 'l' and field ~= 'l:' .. gateway then
    local amount, ends = string.match(value, '^(%S+) (%S+)$')
    if tonumber(ends) <= now then
      redis.call('HDEL', key, field)
    else
      leased = leased + tonumber(amount)
      holders = holders + 1
    end
  end
end
local open = redis.call('ZCOUNT', KEYS[2], now, '+inf') + redis.call('ZCOUNT', KEYS[3], now, '+inf')
local free, granted = limit - spent - leased - open * mean, 0
if free >= need and free > 0 then granted = math.min(wanted, math.max(need, free / 2)) end
if retained + granted > 0 then
  redis.call('HSET', key, 'l:' .. gateway, text(retained + granted) .. ' ' .. text(now + lease_ms))
  holders = holders + 1
else
  redis.call('HDEL', key, 'l:' .. gateway)
end
if of ~= ARGV[2] then announced = 0 end  -- the limit was changed since
if noticed > announced then
  announced = noticed
  redis.call('HSET', key, 'noticed', noticed, 'noticed-of', ARGV[2])
end
local level = 0
if spent >= limit then level = 2 elseif warn_at and spent >= warn_at * limit then level = 1 end
if level <= announced then level = 0 end
redis.call('PEXPIRE', key, ARGV[12])
return {text(granted), text(spent), text(leased + granted), text(open * mean), holders, cut, level}
"""
SETTLE = """
local key, cut, spent = KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2])
local before = tonumber(redis.call('HGET', key, 'cut'))
if not before or cut <= before then return 0 end
local counted = tonumber(redis.call('HGET', key, 'base') or 0)
local fields = redis.call('HGETALL', key)
for i = 1, #fields, 2 do
  local minute = tonumber(string.match(fields[i], '^m(%d+)$'))
  if minute and minute < cut then
    counted = counted + tonumber(fields[i + 1])
    redis.call('HDEL', key, fields[i])
  end
end
if ARGV[3] ~= '1' then spent = math.max(spent, counted) end
redis.call('HSET', key, 'base', string.format('%.17g', spent), 'cut', cut)
return 1
"""


class RedisBudgetStore:
    """Budgets on Redis; see `backbone.store.budgets`. It uses the connection of a RedisStore, which opens and closes it."""

    def __init__(self, store: RedisStore) -> None:
        """Share the store's connections, time-outs and circuit breaker."""
        self._connection = store.connection
        self._exchange = self._connection.script(EXCHANGE)
        self._settle = self._connection.script(SETTLE)

    async def exchange(self, key: BudgetKey, gateway: str, report: BudgetReport) -> BudgetStanding | None:
        """Report and take a share in one atomic step; see `BudgetStore`."""
        remembered = report.remembered
        args: list[str | bytes | int | float] = [
            gateway,
            repr(report.limit),
            repr(report.need),
            repr(report.wanted),
            repr(report.retained),
            report.jobs,
            repr(report.jobs_estimate),
            report.noticed,
            "" if report.warn_at is None else repr(report.warn_at),
            "" if remembered is None else repr(remembered.spent),
            0 if remembered is None else remembered.cut,
            max(1, round(1000 * report.ttl_s)),
            round(1000 * LEASE_S),
        ]
        for minute, amount in report.spent.items():
            args += [minute, repr(amount)]
        names = [keys.budget(key.name, key.start), *keys.open_jobs(key.holder, key.holder_id)]
        answer = await self._connection.run(self._exchange, names, args)
        if not answer:
            return None
        granted, spent, leased, jobs_reserved, holders, cut, level = answer
        return BudgetStanding(
            float(granted), float(spent), float(leased), float(jobs_reserved), int(holders), int(cut), int(level)
        )

    async def settle(self, key: BudgetKey, cut: int, spent: float, *, complete: bool) -> None:
        """Replace a part of what was reported; see `BudgetStore`."""
        await self._connection.run(self._settle, [keys.budget(key.name, key.start)], [cut, repr(spent), int(complete)])
